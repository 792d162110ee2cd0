"""One round: a tree is proposed, verified in one pass, walked, and its accepted path committed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vispec import ops
from vispec.cache import KeyValueCache
from vispec.decode.processors import process_logits
from vispec.decode.stats import GenerationStats
from vispec.decode.stopping import Transcript
from vispec.drafts.base import DraftSession
from vispec.ops import Sampling
from vispec.prompt import Prompt
from vispec.tree import DraftTree


class Verifier(Protocol):
    """What a round needs of a target."""

    def verify(self, tree: DraftTree, positions: Tensor, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and features [B, T, C] of all nodes, in one pass."""


@dataclass
class Outcome:
    """What one round gave, on the device: see `ops.accept` for all but the tree and the features [B, T, C]."""

    tree: DraftTree
    features: Tensor | None
    path: Tensor
    emitted: Tensor
    counts: Tensor
    status: Tensor

    def packed(self) -> Tensor:
        """All that the host wants to know, [B, 2 + 2D] int64: status, count, emitted tokens, path."""
        return torch.cat([self.status[:, None], self.counts[:, None], self.emitted, self.path], dim=1)


@dataclass
class RoundEvent:
    """One finished round, for whoever watches: a streamer, the coloured tree of the command line.

    Attributes:
        tree: the proposed tree, None for the token that the prefill brought.
        path: for each row the accepted nodes, root first.
        emitted: for each row the tokens it emitted.
    """

    tree: DraftTree | None
    path: list[list[int]]
    emitted: list[list[int]]


class Engine:
    """The state of one generation: the target's cache, each row's root, the transcript, the draft's session."""

    def __init__(
        self,
        target: Verifier,
        prompt: Prompt,
        transcript: Transcript,
        sampling: Sampling | None,
        end_tokens: Tensor,
        processors: list,
        stats: GenerationStats,
    ) -> None:
        self.target = target
        self.cache = prompt.cache
        self.positions = prompt.next_positions
        self.transcript = transcript
        self.sampling = sampling
        self.end_tokens = end_tokens
        self.processors = processors
        self.stats = stats
        self.roots = torch.zeros_like(prompt.lengths)
        self.draft: DraftSession | None = None

    def first(self, logits: Tensor) -> RoundEvent:
        """Takes the token after the prompt from the prefill's logits [B, V].

        It is a round whose tree is the prompt's last token alone, one position before the first root.
        """
        last = torch.tensor([int(self.transcript.history(row)[-1]) for row in range(len(logits))])
        tree = DraftTree.root_only(last.to(self.roots.device))
        outcome = self._accept(logits[:, None], None, tree, self.cache.lengths - 1)
        kept = self._take(outcome.packed().tolist())
        self.roots.copy_(outcome.emitted[:, 0])
        self.transcript.remaining -= outcome.counts
        return RoundEvent(None, [[] for _ in kept], kept)

    def step(self) -> RoundEvent:
        """Runs one round and waits for what it gave."""
        outcome = self.forward()
        with self.stats.timed("accept"):
            rows = outcome.packed().tolist()
            kept, paths = self.read(rows)
            host_counts = [len(tokens) for tokens in kept]
            if host_counts != [values[1] for values in rows]:
                # A stopping criterion cut what the op emitted.
                outcome.counts = torch.tensor(host_counts, dtype=torch.int64, device=self.roots.device)
        self.advance(outcome, host_counts)
        return RoundEvent(outcome.tree, paths, kept)

    def forward(self) -> Outcome:
        """Proposes, verifies and accepts; nothing waits for the device, and no state but `finished` changes."""
        with self.stats.timed("draft"):
            tree = DraftTree.root_only(self.roots) if self.draft is None else self.draft.propose(self.roots)
        with self.stats.timed("verify"):
            logits, features = self.target.verify(tree, self.positions, self.cache)
        with self.stats.timed("accept"):
            return self._accept(logits, features, tree, self.cache.lengths)

    def advance(self, outcome: Outcome, host_counts: list[int] | None) -> None:
        """Commits a round's tokens, in place; `host_counts` where the host knows them, which saves empty work."""
        counts = outcome.counts
        with self.stats.timed("accept"):
            self.cache.commit(outcome.path, counts, host_counts)
            self.positions += counts
            last = outcome.emitted.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
            self.roots.copy_(torch.where(counts > 0, last, self.roots))
            self.transcript.remaining -= counts
        if self.draft is not None and (host_counts is None or not self.transcript.done):
            with self.stats.timed("draft"):
                width = outcome.path.shape[1] if host_counts is None else max(host_counts)
                nodes = outcome.path[:, :width].clamp(min=0)
                features = outcome.features
                picked = features.gather(1, nodes[:, :, None].expand(-1, -1, features.shape[-1]))
                self.draft.commit(picked, outcome.emitted[:, :width].clamp(min=0), counts, host_counts)

    def read(self, rows: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Notes a round's `packed` rows: returns the tokens that the transcript kept of each, and their nodes."""
        kept = self._take(rows)
        self.stats.rounds += 1
        self.stats.accepted_per_round.extend(len(tokens) - 1 for tokens in kept if tokens)
        depth = len(rows[0]) // 2 - 1
        paths = [values[2 + depth : 2 + depth + len(tokens)] for values, tokens in zip(rows, kept, strict=True)]
        return kept, paths

    def _take(self, rows: list[list[int]]) -> list[list[int]]:
        failed = [row for row, values in enumerate(rows) if values[0]]
        if failed:
            raise FloatingPointError(
                f"fast_generate: logits are not finite in round {self.stats.rounds} (rows {failed}): "
                "the model's weights or inputs hold NaN or infinity"
            )
        kept = self.transcript.extend([values[2 : 2 + values[1]] for values in rows])
        self.stats.new_tokens += sum(len(tokens) for tokens in kept)
        return kept

    def _accept(self, logits: Tensor, features: Tensor | None, tree: DraftTree, lengths: Tensor) -> Outcome:
        """Walks the tree; the transcript's last token is its root."""
        transcript = self.transcript
        batch, depth, device = len(lengths), tree.longest_path, lengths.device
        if self.processors:
            histories = [transcript.history(row)[:-1] for row in range(batch)]
            logits = process_logits(self.processors, logits, tree, histories, transcript.prompt_lengths)
        path = torch.empty(batch, depth, dtype=torch.int64, device=device)
        emitted, counts, status = torch.empty_like(path), torch.empty_like(lengths), torch.empty_like(lengths)
        ops.accept(
            logits,
            tree.tokens,
            tree.parents,
            lengths,
            end_tokens=self.end_tokens,
            remaining=transcript.remaining,
            finished=transcript.finished,
            path=path,
            emitted=emitted,
            counts=counts,
            status=status,
            sampling=self.sampling,
        )
        return Outcome(tree, features, path, emitted, counts, status)
