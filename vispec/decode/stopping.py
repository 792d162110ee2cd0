"""The text so far, and when a row is done."""

from __future__ import annotations

import torch
from torch import Tensor


class Transcript:
    """Every row's tokens without padding: the prompt and what has been emitted.

    Attributes:
        rows: B lists of emitted token ids.
        finished: [B] int64 on the device, nonzero where a row is done (the `accept` op reads and writes it).
        remaining: [B] int64 on the device, tokens that each row may still emit.
    """

    def __init__(
        self, tokens: Tensor, lengths: Tensor, max_new_tokens: int, end_tokens: list[int], criteria: list
    ) -> None:
        self.prompt = tokens
        self.prompt_lengths: list[int] = lengths.tolist()
        self.rows: list[list[int]] = [[] for _ in self.prompt_lengths]
        self.finished = torch.zeros_like(lengths)
        self.remaining = torch.full_like(lengths, max_new_tokens)
        self._max_new_tokens = max_new_tokens
        self._end_tokens = set(end_tokens)
        self._criteria = criteria
        self._ended = [False] * len(self.rows)

    @property
    def done(self) -> bool:
        """Whether every row has ended, as far as the host has read."""
        return all(self._ended)

    @property
    def tokens_left(self) -> int:
        """Most tokens that any row may still emit, as far as the host has read."""
        rows = zip(self.rows, self._ended, strict=True)
        return max((self._max_new_tokens - len(row) for row, ended in rows if not ended), default=0)

    def history(self, row: int) -> Tensor:
        """A row's tokens [n] int64, prompt first."""
        prompt = self.prompt[row, : self.prompt_lengths[row]]
        return torch.cat([prompt, torch.tensor(self.rows[row], dtype=prompt.dtype, device=prompt.device)])

    def extend(self, emitted: list[list[int]]) -> list[list[int]]:
        """Adds what a round emitted, cut where a stopping criterion holds; returns what was kept.

        A criterion is asked after every token, as plain generation would; a row that it ends emits no more, and what
        a round that was already under way brings for it is dropped.
        """
        kept = []
        for row, tokens in enumerate(emitted):
            taken: list[int] = []
            for token in tokens:
                if self._ended[row]:
                    break
                self.rows[row].append(token)
                taken.append(token)
                if self._criteria and self._stops(row):
                    self.finished[row] = 1
                    self._ended[row] = True
                self._ended[row] |= token in self._end_tokens or len(self.rows[row]) == self._max_new_tokens
            kept.append(taken)
        return kept

    def _stops(self, row: int) -> bool:
        history = self.history(row)[None]
        return any(bool(torch.as_tensor(criterion(history, None)).all()) for criterion in self._criteria)

    def sequences(self, original: Tensor, pad_token_id: int) -> Tensor:
        """The caller's prompt [B, S] with the new tokens behind it, right-padded: [B, S + new] int64."""
        longest = max(len(row) for row in self.rows)
        new = torch.full((len(self.rows), longest), pad_token_id, dtype=original.dtype, device=original.device)
        for index, row in enumerate(self.rows):
            new[index, : len(row)] = torch.tensor(row, dtype=original.dtype, device=original.device)
        return torch.cat([original, new], dim=1)
