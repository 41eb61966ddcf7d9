"""Planted facts: six digits stated once in a long text and asked for later.

A fact is stated as ``[The vault code of Clara Whitcombe is 402913.]`` and asked for as
``[Question: what is the vault code of Clara Whitcombe? Answer: 402913.]``. Recall is exact or nothing,
so a method that loses a needle cannot hide behind a smooth average. The digits are drawn uniformly:
no prior helps to guess them. With the built-in pair's tokenizer the answer is exactly 6 tokens (one a
digit, the first with its leading space), and each text tokenises the same alone as inside a document,
so facts may be planted as token sequences.

>>> import random
>>> fact = draw_facts(random.Random(0), 1)[0]
>>> fact.question + fact.answer + fact.closing == fact.exchange
True
"""

from __future__ import annotations

import random
from dataclasses import dataclass

DIGITS = 6

KINDS = (
    "vault code",
    "secret number",
    "ticket number",
    "house number",
    "prison number",
    "telegram number",
    "ledger number",
    "pass code",
    "regiment number",
    "lottery number",
    "grave number",
    "library number",
    "ship number",
    "debt",
    "yearly income",
    "fortune",
)

_FIRST_NAMES = """
Ada Agnes Albert Alice Ambrose Amelia Arthur Barnaby Beatrice Bertram Bridget Caleb Caroline Cecil Charlotte
Clara Clement Constance Cyril Daniel Dorothea Edgar Edith Edmund Eleanor Elias Emmeline Ernest Esther Eugenia
Felix Flora Frances Gabriel Geoffrey Gertrude Gilbert Harriet Hector Helena Henrietta Horace Hugh Ida Isaac
Isabel Jasper Josephine Julian Laura Leonard Louisa Lydia Mabel Magnus Margery Martin Matilda Miriam Nathaniel
Nora Octavia Oliver Oswald Percival Philippa Phoebe Quentin Rachel Reginald Rosalind Rufus Sabina Silas Stella
Sylvia Theodore Ursula Victor Winifred
"""
_SURNAMES = """
Abernathy Ainsworth Aldridge Appleby Ashdown Atwater Barlow Beckett Blackwood Bramwell Brightwell Caldwell
Carlisle Chadwick Cheswick Clifton Colebrook Cranston Dalton Danvers Denholm Drummond Eastman Ellery Everard
Fairfax Farnham Fenwick Garland Gladwin Goodwin Grantham Hadley Halloran Harcourt Hathaway Hollis Ingram
Jessop Keating Kendrick Kingsley Langdon Lockhart Loxley Mallory Marchbanks Merriman Middleton Norwood Oakley
Ormsby Pemberton Penrose Pickering Prescott Quimby Radcliffe Ravenhill Redfern Rutherford Saltmarsh Sheffield
Stanhope Sterling Talbot Thackeray Thornton Tremaine Underhill Vane Wadsworth Wainwright Walcott Westbrook
Whitcombe Winslow Woodruff Yardley Yorke
"""
FIRST_NAMES, SURNAMES = tuple(_FIRST_NAMES.split()), tuple(_SURNAMES.split())


@dataclass(frozen=True)
class Fact:
    """One planted fact and the texts that state it and ask for it."""

    kind: str
    name: str
    digits: str

    @property
    def statement(self) -> str:
        """The sentence to plant."""
        return f"[The {self.kind} of {self.name} is {self.digits}.]"

    @property
    def question(self) -> str:
        """The prompt, up to and including ``Answer:``."""
        return f"[Question: what is the {self.kind} of {self.name}? Answer:"

    @property
    def answer(self) -> str:
        """What has to follow the prompt: a space and the digits."""
        return f" {self.digits}"

    @property
    def closing(self) -> str:
        """What follows the answer."""
        return ".]"

    @property
    def exchange(self) -> str:
        """Question, answer and closing in one string, as planted in training texts."""
        return self.question + self.answer + self.closing


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Draw ``count`` facts about distinct (kind, name) pairs; the same ``rng`` state gives the same facts."""
    possible = len(KINDS) * len(FIRST_NAMES) * len(SURNAMES)
    if not 0 <= count <= possible:
        raise ValueError(f"count must be between 0 and {possible}, the number of distinct subjects, got {count}")
    facts = []
    for subject in rng.sample(range(possible), count):
        rest, kind = divmod(subject, len(KINDS))
        first, last = divmod(rest, len(SURNAMES))
        digits = f"{rng.randrange(10**DIGITS):0{DIGITS}d}"
        facts.append(Fact(KINDS[kind], f"{FIRST_NAMES[first]} {SURNAMES[last]}", digits))
    return facts
