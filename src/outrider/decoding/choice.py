"""What the next rounds may be."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Choice:
    """How rounds are run: by a mode, with K drafted tokens."""

    mode: str  # plain, dense, sparse, or exact: sparse rounds whose tokens are tentative
    k: int  # 0 in mode plain

    @property
    def name(self) -> str:
        """As statistics have it: "plain", "dense K=4"."""
        return f"{self.mode} K={self.k}" if self.k else self.mode


PLAIN = Choice("plain", 0)


def fixed_choice(config: EngineConfig) -> Choice:
    """The only one in every mode but auto."""
    return PLAIN if config.mode == "plain" else Choice(config.mode, config.draft_tokens)


def widths(most: int) -> list[int]:
    """Numbers of drafted tokens that are chosen among, where `most` are asked for; ascending."""
    return sorted({most, *(k for k in (1, 2, 4, 8) if k < most)})
