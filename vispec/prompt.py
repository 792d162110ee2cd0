"""What a target's prefill hands to the engine and to a draft."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor

from vispec.cache import KeyValueCache


@dataclass(frozen=True)
class Span:
    """One contiguous run of image or video placeholder tokens in a prompt without padding.

    Attributes:
        start: index of its first token.
        length: number of tokens.
        frames: pieces of equal length that are compressed one by one; more than 1 only for video.
    """

    start: int
    length: int
    frames: int = 1

    def without_first_token(self) -> Span:
        """The span less the prompt's first token, which no row of a draft holds."""
        return replace(self, start=1, length=self.length - 1) if self.start == 0 else self

    def moved(self, tokens: int) -> Span:
        """The same span so many tokens to the right."""
        return replace(self, start=self.start + tokens)

    def pieces(self) -> list[tuple[int, int]]:
        """(start, length) of each frame, as equal as they can be, longer ones first."""
        short, longer = divmod(self.length, self.frames)
        lengths = [short + (frame < longer) for frame in range(self.frames)]
        return list(zip(accumulate(lengths[:-1], initial=self.start), lengths, strict=True))


@dataclass
class Prompt:
    """A prefilled batch. B rows without padding, S tokens in the longest, C hidden units, V tokens.

    Attributes:
        tokens: [B, S] int64, rows left-aligned.
        lengths: [B] int64.
        features: [B, S, C] the decoder's output after its final norm.
        embeddings: [B, S, C] the rows the decoder read, images merged.
        logits: [B, V] for the token after each row.
        next_positions: [B] int64 rotary position of the token after each row.
        spans: the image and video spans of each row, in order.
        cache: the target's keys and values.
    """

    tokens: Tensor
    lengths: Tensor
    features: Tensor
    embeddings: Tensor
    logits: Tensor
    next_positions: Tensor
    spans: list[list[Span]]
    cache: KeyValueCache
