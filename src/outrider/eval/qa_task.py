"""Task "qa": questions about local documents, answered greedily; token F1 and ROUGE-L against the references."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from outrider.config import check
from outrider.decoding.prefill import ProgressCallback
from outrider.errors import OptionError, PromptError
from outrider.eval.answers import Answering, counter
from outrider.eval.book import Book, longest_that_fits
from outrider.eval.qa_data import Document
from outrider.eval.rows import Case, Row, Text, conditions, of_case
from outrider.eval.scores import rouge_l, token_f1
from outrider.eval.teacher_forced import check_context
from outrider.guidance.alignment import AlignmentFile
from outrider.models import LanguageModel
from outrider.models.quantized_keys import code_bits

OPENING = "Read the following text and answer the question as concisely as you can, in a single phrase if possible.\n\n"
STOP = ("\n",)  # an answer is what follows on the same line


def evaluate(
    pair: tuple[LanguageModel, LanguageModel],
    alignments: AlignmentFile | None,
    documents: list[Document],
    cases: list[Case],
    *,
    context: int,
    plant_in: Text | None = None,
    truncate: bool = False,
    max_new_tokens: int = 32,
    seed: int = 0,
    draft_tokens: int = 4,
    score_keys: str = "auto",
    map_name: str | None = None,
    prefill_chunk: int = 2048,
    progress: ProgressCallback | None = None,
) -> Iterator[Row]:
    """Ask all questions of every document; yields one row per (document, case), its scores the means over the questions.

    A document stands alone or, with `plant_in`, at a drawn place of that book, of which as much is taken as fits. With prompt
    and answer it takes at most `context` tokens; one that does not fit is refused or, with `truncate`, loses its middle.
    agreement is the share of the answers' tokens that the dense target, given the same text, would also have chosen. All
    options are checked, and all prompts made, before any work: OptionError, PromptError.
    """
    check("max-new-tokens", max_new_tokens, max_new_tokens >= 1, "a whole number >= 1")
    check_context(context, pair, 2)
    if context <= max_new_tokens:
        raise OptionError("context", context, f"more than max-new-tokens {max_new_tokens}")
    count = counter(pair[0])
    answering = Answering(
        pair,
        alignments,
        cases,
        draft_tokens=draft_tokens,
        score_keys=score_keys,
        map_name=map_name,
        prefill_chunk=prefill_chunk,
    )
    book = None if plant_in is None else Book(plant_in.text)
    room = context - max_new_tokens
    prompts = [_prompts(_fitting(document, count, room, truncate), book, count, room, seed) for document in documents]
    common = conditions(pair, draft_tokens, map_name, code_bits(score_keys, pair[1], draft_tokens + 1))
    if plant_in is not None:
        common |= {"plant_in": plant_in.name, "seed": seed}
    if truncate:
        common |= {"truncate": "middle"}

    def rows() -> Iterator[Row]:
        for done, (document, asked) in enumerate(zip(documents, prompts, strict=True), start=1):
            for number, case in enumerate(cases):
                answers = answering.answer(number, asked, max_new_tokens, STOP)
                pairs = [(text, one.answers) for text, one in zip(answers.texts, document.asked, strict=True)]
                yield Row(
                    task="qa",
                    text=document.name,
                    method=case.method,
                    keep=case.budget.keep if case.budget else None,
                    top_p=case.budget.top_p if case.budget else None,
                    context=context,
                    scored_tokens=answers.tokens,
                    agreement=answers.agreement,
                    asked=len(asked),
                    f1=sum(token_f1(*one) for one in pairs) / len(pairs),
                    rouge_l=sum(rouge_l(*one) for one in pairs) / len(pairs),
                    kept_fraction=answers.kept_fraction,
                    kv_read_fraction=answers.kv_read_fraction,
                    seconds=answers.seconds,
                    conditions=of_case(common, case),
                )
            if progress is not None:
                progress("qa", done, len(documents))

    return rows()


def _made(text: str, document: Document) -> list[str]:
    """One prompt a question."""
    return [f"{OPENING}{text}\n\nQuestion: {asked.question}\nAnswer:" for asked in document.asked]


def _fitting(document: Document, count: Callable[[str], int], room: int, truncate: bool) -> Document:
    """The document, without its middle if need be and allowed.

    Raises PromptError where one of its prompts would have more than `room` tokens all the same.
    """

    def needed(text: str) -> int:
        return max(map(count, _made(text, document)))

    if needed(document.context) <= room:
        return document
    if not truncate or needed("") > room:
        allowed = f"at most {room} (context less answer){'' if truncate else ', or --truncate'}"
        raise PromptError(f"{document.name}: {needed(document.context)} tokens with its questions; allowed: {allowed}")
    words = Book(document.context)
    kept = longest_that_fits(lambda size: needed(words.without_middle(size)) <= room, 0, len(words.words))
    return replace(document, context=words.without_middle(kept))


def _prompts(document: Document, book: Book | None, count: Callable[[str], int], room: int, seed: int) -> list[str]:
    """One prompt a question, all with the same text before it, none with more than `room` tokens."""
    if book is None:
        return _made(document.context, document)
    rng = random.Random(f"{seed} {document.name}")
    depth, start = rng.random(), rng.randrange(max(1, len(book.words) - room + 1))

    def text(words: int) -> str:
        return book.planted(start, words, [(depth, f"\n\n{document.context}\n\n")])

    def fits(words: int) -> bool:
        return max(map(count, _made(text(words), document))) <= room

    most = min(room, len(book.words) - start)
    if fits(most):
        raise PromptError(f"--plant-in: too short, a prompt with all of its {most} words has room left; allowed: a longer book")
    return _made(text(longest_that_fits(fits, 0, most)), document)
