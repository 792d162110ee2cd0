"""Answers that repeat themselves: easy to guess, so they would teach a draft little and flatter its figures."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# An answer may be fine as a whole and loop at its end.
LAST_TOKENS = 32


def repeated(tokens: Sequence[int]) -> float:
    """The share of a text's 4-grams that occurred before in it."""
    grams = [tuple(tokens[start : start + 4]) for start in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(answer: Sequence[int], max_repeated: float) -> bool:
    """Whether more than that share of the 4-grams of an answer, or of its last 32 tokens, occurred before in it."""
    return max(repeated(answer), repeated(answer[-LAST_TOKENS:])) > max_repeated


def looped(answer: Sequence[int], ended: bool, max_new_tokens: int, max_repeated: float) -> bool:
    """Whether a generated answer loops, or was broken off because it did: without an end below the limit."""
    return loops(answer, max_repeated) or (not ended and len(answer) < max_new_tokens)


def breaking_off(max_repeated: float, placeholders: Sequence[int]) -> dict[str, list[BreakOff]]:
    """Generation options by which an answer ends where it loops; none where every answer is welcome."""
    return {"stopping_criteria": [BreakOff(max_repeated, placeholders)]} if max_repeated < 1 else {}


class BreakOff:
    """A stopping criterion: the last tokens loop. What stands before an answer counts, back to the last picture."""

    def __init__(self, max_repeated: float, placeholders: Sequence[int]) -> None:
        self.max_repeated = max_repeated
        self.placeholders = frozenset(placeholders)

    def __call__(self, history: Tensor, scores: object) -> bool:
        tokens = history[0, -LAST_TOKENS:].tolist()
        seen = [place for place, token in enumerate(tokens) if token in self.placeholders]
        return repeated(tokens[seen[-1] + 1 :] if seen else tokens) > self.max_repeated
