"""One round: a tree is proposed, verified in one pass, walked, and its accepted path committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vispec import ops
from vispec.cache import KeyValueCache
from vispec.decode.guard import cut, near_ties
from vispec.decode.policy import Outcome, TreePolicy
from vispec.decode.processors import process_logits
from vispec.decode.stats import GenerationStats
from vispec.decode.stopping import Transcript
from vispec.drafts.base import DraftSession, Plan
from vispec.ops import Sampling
from vispec.prompt import Prompt
from vispec.tree import DraftTree


class Verifier(Protocol):
    """What a round needs of a target; see `targets.Target`."""

    row_exact: bool
    most_nodes: int

    def pass_rows(self, nodes: int) -> int:
        """Slots behind the committed ones that a pass over so many nodes takes."""

    def verify(self, tree: DraftTree, positions: Tensor, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and features [B, T, C] of all nodes, in one pass."""


@dataclass
class Accepted:
    """What the target said of one tree, on the device: see `ops.accept`; `cut` [B] bool marks what a near-tie ended."""

    path: Tensor
    emitted: Tensor
    counts: Tensor
    status: Tensor
    cut: Tensor

    def packed(self) -> Tensor:
        """All that the host wants to know, [B, 3 + 2D] int64: status, cut, count, emitted tokens, path."""
        return torch.cat([torch.stack([self.status, self.cut.long(), self.counts], 1), self.emitted, self.path], dim=1)


@dataclass
class Heard:
    """What the host made of a round's `packed` rows: the tokens that the transcript kept, their nodes, the cuts."""

    emitted: list[list[int]]
    paths: list[list[int]]
    cut: list[bool]

    @property
    def counts(self) -> list[int]:
        """Tokens of each row."""
        return [len(tokens) for tokens in self.emitted]


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


class Committed(NamedTuple):
    """What a round committed and the draft has yet to learn: see `DraftSession.commit`."""

    features: Tensor
    tokens: Tensor
    counts: Tensor
    host_counts: list[int] | None

    @classmethod
    def joined(cls, rounds: list[Committed]) -> Committed:
        """Several rounds as one: each row's tokens moved together, in order."""
        if len(rounds) == 1:
            return rounds[0]
        features, tokens = (torch.cat(parts, dim=1) for parts in zip(*(one[:2] for one in rounds), strict=True))
        columns: list[list[int]] = [[] for _ in rounds[0].host_counts]
        start = 0
        for one in rounds:
            for row, count in enumerate(one.host_counts):
                columns[row] += range(start, start + count)
            start += one.tokens.shape[1]
        host_counts = [len(row) for row in columns]
        width = max(host_counts)
        picked = torch.tensor([row + [0] * (width - len(row)) for row in columns], device=tokens.device)
        counts = torch.stack([one.counts for one in rounds]).sum(0)
        features = features.gather(1, picked[:, :, None].expand(-1, -1, features.shape[2]))
        return cls(features, tokens.gather(1, picked), counts, host_counts)


class Speculation:
    """The draft's side of one generation: started when first asked for, brought up to date when next asked.

    While the policy decodes plainly the draft does nothing; what it misses is kept, one feature a token, and read in
    one pass later, which costs a tenth of as many single passes.
    """

    def __init__(self, policy: TreePolicy, start: Callable[[], DraftSession]) -> None:
        self.policy = policy
        self._start: Callable[[], DraftSession] | None = start
        self._session: DraftSession | None = None
        self._missed: list[Committed] = []

    @property
    def backlog(self) -> bool:
        """Whether a proposal has more to catch up with than the last round."""
        return self._session is None or len(self._missed) > 1

    def propose(self, plan: Plan, roots: Tensor) -> DraftTree:
        """A tree behind the roots [B]."""
        session = self.session()
        if self._missed:
            session.commit(*Committed.joined(self._missed))
            self._missed = []
        return session.propose(roots, plan)

    def session(self) -> DraftSession:
        """The draft's session, started if it was not."""
        if self._session is None:
            # The prompt's features go with the function.
            self._session, self._start = self._start(), None
        return self._session

    def missed(self, committed: Committed) -> None:
        """Notes a round for the next proposal."""
        self._missed.append(committed)


class Engine:
    """The state of one generation: the target's cache, each row's root, the transcript, the draft's side."""

    def __init__(
        self,
        target: Verifier,
        prompt: Prompt,
        transcript: Transcript,
        sampling: Sampling | None,
        end_tokens: Tensor,
        processors: list,
        stats: GenerationStats,
        guard: torch.dtype | None = None,
    ) -> None:
        self.target = target
        self.cache = prompt.cache
        self.positions = prompt.next_positions
        self.transcript = transcript
        self.sampling = sampling
        self.end_tokens = end_tokens
        self.processors = processors
        self.stats = stats
        # The model's dtype where near-ties are left to a pass over one token, which the next round then is.
        self.guard = guard
        self._undecided = False
        self.roots = torch.zeros_like(prompt.lengths)
        self.speculation: Speculation | None = None

    def first(self, logits: Tensor) -> RoundEvent:
        """Takes the token after the prompt from the prefill's logits [B, V].

        It is a round whose tree is the prompt's last token alone, one position before the first root.
        """
        last = torch.tensor([int(self.transcript.history(row)[-1]) for row in range(len(logits))])
        tree = DraftTree.root_only(last.to(self.roots.device))
        accepted = self._accept(logits[:, None], tree, self.cache.lengths - 1)
        heard = self._take(accepted.packed().tolist())
        self.roots.copy_(accepted.emitted[:, 0])
        self.transcript.remaining -= accepted.counts
        return RoundEvent(None, [[] for _ in heard.emitted], heard.emitted)

    def step(self) -> RoundEvent:
        """Runs one round and waits for what it gave."""
        stats, speculation = self.stats, self.speculation
        spent = stats.draft_seconds, stats.verify_seconds + stats.accept_seconds
        plan = None if speculation is None or self._undecided else speculation.policy.next(self.transcript.finished)
        backlog = speculation is not None and speculation.backlog
        with stats.timed("draft"):
            tree = DraftTree.root_only(self.roots) if plan is None else speculation.propose(plan, self.roots)
        accepted, features = self.judge(tree)
        with stats.timed("accept"):
            rows = accepted.packed().tolist()
            heard = self.read(rows, tree.size)
            self._undecided = any(heard.cut)
            if heard.counts != [values[2] for values in rows]:
                # A stopping criterion cut what the op emitted.
                accepted.counts = torch.tensor(heard.counts, dtype=torch.int64, device=self.roots.device)
        learns = speculation is not None and not self.transcript.done and any(heard.counts)
        learned = self.advance(accepted, features if learns else None, heard.counts)
        if learned is not None:
            speculation.missed(learned)
        if speculation is not None:
            draft_seconds = stats.draft_seconds - spent[0]
            target_seconds = stats.verify_seconds + stats.accept_seconds - spent[1]
            if plan is None:
                speculation.policy.learn_plain(target_seconds)
            elif speculation.policy.wants_outcomes:
                outcome = self._outcome(tree, accepted, draft_seconds, backlog, target_seconds)
                speculation.policy.learn(plan, outcome)
        return RoundEvent(tree, heard.paths, heard.emitted)

    def judge(self, tree: DraftTree) -> tuple[Accepted, Tensor]:
        """Verifies a tree and walks it; nothing waits for the device, and no state but `finished` changes.

        Returns the walk and the features [B, T, C] of all nodes.
        """
        with self.stats.timed("verify"):
            logits, features = self.target.verify(tree, self.positions, self.cache)
        with self.stats.timed("accept"):
            return self._accept(logits, tree, self.cache.lengths), features

    def advance(self, accepted: Accepted, features: Tensor | None, host_counts: list[int] | None) -> Committed | None:
        """Commits a round's tokens, in place; `host_counts` where the host knows them.

        Returns what the draft learns of it, where all nodes' features [B, T, C] are given.
        """
        path, emitted, counts = accepted.path, accepted.emitted, accepted.counts
        with self.stats.timed("accept"):
            gather = None
            if features is not None:
                picked = features.new_empty(*path.shape, features.shape[2])
                gather = ops.Gather(features, picked, torch.empty_like(emitted))
            self.cache.commit(
                path,
                emitted,
                counts,
                host_counts,
                positions=self.positions,
                remaining=self.transcript.remaining,
                roots=self.roots,
                gather=gather,
            )
        if gather is None:
            return None
        width = path.shape[1] if host_counts is None else max(host_counts)
        return Committed(gather.picked[:, :width], gather.tokens[:, :width], counts, host_counts)

    def read(self, rows: list[list[int]], nodes: int) -> Heard:
        """Notes the `packed` rows of a round whose trees had so many nodes."""
        heard = self._take(rows)
        stats = self.stats
        stats.rounds += 1
        stats.nodes_per_round.append(nodes)
        stats.accepted_per_round.extend(count - 1 for count in heard.counts if count)
        stats.guarded += sum(heard.cut)
        return heard

    def _take(self, rows: list[list[int]]) -> Heard:
        failed = [row for row, values in enumerate(rows) if values[0]]
        if failed:
            raise FloatingPointError(
                f"fast_generate: logits are not finite in round {self.stats.rounds} (rows {failed}): "
                "the model's weights or inputs hold NaN or infinity"
            )
        kept = self.transcript.extend([values[3 : 3 + values[2]] for values in rows])
        self.stats.new_tokens += sum(map(len, kept))
        start = 3 + (len(rows[0]) - 3) // 2
        paths = [values[start : start + len(tokens)] for values, tokens in zip(rows, kept, strict=True)]
        return Heard(kept, paths, [bool(values[1]) for values in rows])

    def _outcome(
        self, tree: DraftTree, accepted: Accepted, draft_seconds: float, backlog: bool, target_seconds: float
    ) -> Outcome:
        """What the policy learns of a round, of the rows whose paths the draft alone ended."""
        going = (self.transcript.finished == 0) & ~accepted.cut
        on_path = torch.zeros(len(going), tree.size + 1, dtype=torch.bool, device=going.device)
        # Places beyond a path hold -1, which falls on the column that is cut off.
        on_path.scatter_(1, accepted.path + 1, True)
        return Outcome(
            draft_seconds, backlog, target_seconds, tree.scores[going], tree.parents[going], on_path[going, 1:]
        )

    def _accept(self, logits: Tensor, tree: DraftTree, lengths: Tensor) -> Accepted:
        """Walks the tree; the transcript's last token is its root."""
        transcript = self.transcript
        batch, depth, device = len(lengths), tree.longest_path, lengths.device
        if self.processors:
            histories = [transcript.history(row)[:-1] for row in range(batch)]
            logits = process_logits(self.processors, logits, tree, histories, transcript.prompt_lengths)
        path = torch.empty(batch, depth, dtype=torch.int64, device=device)
        emitted, counts, status = torch.empty_like(path), torch.empty_like(lengths), torch.empty_like(lengths)
        guarded = self.guard is not None and tree.size > 1
        before = transcript.finished.clone() if guarded else None
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
        undecided = torch.zeros_like(counts, dtype=torch.bool)
        if guarded:
            undecided = cut(path, emitted, counts, near_ties(logits, self.guard))
            # What ended such a row lay behind the cut.
            transcript.finished.copy_(torch.where(undecided, before, transcript.finished))
        return Accepted(path, emitted, counts, status, undecided)
