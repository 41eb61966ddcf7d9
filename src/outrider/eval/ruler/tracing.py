"""Variable tracking: who holds a value that was handed from variable to variable (RULER, section 3)."""

from __future__ import annotations

import string
from itertools import pairwise

from outrider.eval.ruler.draw import Draw
from outrider.eval.ruler.sample import Plan, Question

HOPS = 4
LETTERS = 5  # of a variable's name
TOKENS = 30


def variable_tracking(draw: Draw) -> Plan:
    """One chain of assignments, in order, each on a line of its own; all its variables are asked for.

    RULER shows an example before it asks; here there is none, and the prompt ends without RULER's closing space, which many
    tokenizers would split from the answer's first word.
    """
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(draw.rng.choices(string.ascii_uppercase, k=LETTERS))
        if name not in names and name not in draw.book.text:
            names.append(name)
    value = str(draw.rng.randrange(10**4, 10**5))
    statements = [f"VAR {names[0]} = {value}"]
    statements += [f"VAR {name} = VAR {before}" for before, name in pairwise(names)]
    hidden = draw.hide([f"\n{statement}\n" for statement in statements])
    question = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
        f"chain(s) of variable assignment in the text above, {len(names)} variables are assigned the value {value}, they are:"
    )
    told = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    return Plan(
        build=lambda size: told + hidden.text(size),
        least=1,
        most=hidden.most,
        questions=(Question(text=question, expected=tuple(names)),),
        new_tokens=TOKENS,
    )
