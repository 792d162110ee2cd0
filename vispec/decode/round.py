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
class Accepted:
    """What the target said of one tree: see `ops.accept` for the tensors."""

    path: Tensor
    emitted: Tensor
    counts: Tensor
    host_emitted: list[list[int]]

    @property
    def host_counts(self) -> list[int]:
        return [len(tokens) for tokens in self.host_emitted]


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
        accepted = self._accept(logits[:, None], tree, self.cache.lengths - 1)
        self.roots = accepted.emitted[:, 0]
        return RoundEvent(None, [[] for _ in accepted.host_emitted], accepted.host_emitted)

    def step(self) -> RoundEvent:
        """Runs one round."""
        stats = self.stats
        with stats.timed("draft"):
            tree = DraftTree.root_only(self.roots) if self.draft is None else self.draft.propose(self.roots)
        with stats.timed("verify"):
            logits, features = self.target.verify(tree, self.positions, self.cache)
        with stats.timed("accept"):
            accepted = self._accept(logits, tree, self.cache.lengths)
            host_counts = accepted.host_counts
            stats.rounds += 1
            stats.accepted_per_round.extend(count - 1 for count in host_counts if count)
            self.cache.commit(accepted.path, accepted.counts, host_counts)
            self.positions = self.positions + accepted.counts
            last = accepted.emitted.gather(1, (accepted.counts - 1).clamp(min=0)[:, None])[:, 0]
            self.roots = torch.where(accepted.counts > 0, last, self.roots)
            paths = [row[:count] for row, count in zip(accepted.path.tolist(), host_counts, strict=True)]
        if self.draft is not None and not self.transcript.done:
            with stats.timed("draft"):
                width = max(host_counts)
                nodes = accepted.path[:, :width].clamp(min=0)
                picked = features.gather(1, nodes[:, :, None].expand(-1, -1, features.shape[-1]))
                tokens = accepted.emitted[:, :width].clamp(min=0)
                self.draft.commit(picked, tokens, accepted.counts, host_counts)
        return RoundEvent(tree, paths, accepted.host_emitted)

    def _accept(self, logits: Tensor, tree: DraftTree, lengths: Tensor) -> Accepted:
        """Walks the tree and adds what it gave to the transcript, whose last token is the tree's root."""
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
        host = torch.cat([status[:, None], counts[:, None], emitted], dim=1).tolist()
        failed = [row for row, values in enumerate(host) if values[0]]
        if failed:
            raise FloatingPointError(
                f"fast_generate: logits are not finite in round {self.stats.rounds} (rows {failed}): "
                "the model's weights or inputs hold NaN or infinity"
            )
        kept = transcript.extend([values[2 : 2 + values[1]] for values in host])
        if [len(tokens) for tokens in kept] != [values[1] for values in host]:
            counts = torch.tensor([len(tokens) for tokens in kept], dtype=torch.int64, device=device)
        transcript.remaining = transcript.remaining - counts
        self.stats.new_tokens += sum(len(tokens) for tokens in kept)
        return Accepted(path, emitted, counts, kept)
