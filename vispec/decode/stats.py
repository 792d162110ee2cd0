"""What a generation did and where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class GenerationStats:
    """Counts and times of one call.

    Attributes:
        rounds: rounds of verification, the prefill not among them.
        accepted_per_round: drafted tokens accepted, one entry for each row that was still running in a round. The
            last token of a round counts as the bonus token, also where the row ended before its path did.
        nodes_per_round: nodes verified in each row, one entry a round; 1 is a round of plain decoding.
        guarded: near-ties that a pass over one token decided (`exact="guard"`).
        new_tokens: tokens emitted over all rows.
        prefill_seconds, draft_seconds, verify_seconds, accept_seconds: time of each phase; on a GPU the time until
            the host could go on, since kernels run behind it.
        replay_seconds: time of the rounds that were replayed as CUDA graphs, whose phases cannot be told apart.
    """

    rounds: int = 0
    accepted_per_round: list[int] = field(default_factory=list)
    nodes_per_round: list[int] = field(default_factory=list)
    guarded: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    accept_seconds: float = 0.0
    replay_seconds: float = 0.0

    @property
    def tau(self) -> float:
        """Mean number of drafted tokens accepted a round."""
        return sum(self.accepted_per_round) / len(self.accepted_per_round) if self.accepted_per_round else 0.0

    @property
    def tokens_per_round(self) -> float:
        """tau + 1: each round also brings the target's own bonus token."""
        return self.tau + 1

    @property
    def seconds(self) -> float:
        """Sum of all phases."""
        rounds = self.draft_seconds + self.verify_seconds + self.accept_seconds + self.replay_seconds
        return self.prefill_seconds + rounds

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the time of a block to `<phase>_seconds`."""
        name = f"{phase}_seconds"
        started = time.perf_counter()
        with torch.profiler.record_function(f"vispec::{phase}"):
            yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)
