"""Rounds of which the host knows nothing until they are over: one CUDA graph each, read one round late."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from vispec.decode.fingerprint import Fingerprint
from vispec.decode.kept import Buffers, KeptRounds
from vispec.decode.replay import LATE_ROUNDS, LateReader, Moment, Replayed
from vispec.decode.round import Committed, Engine, RoundEvent
from vispec.decode.shapes import Shape, ShapePolicy
from vispec.drafts.base import FixedSession, Plan
from vispec.ops import Sampling
from vispec.tree import DraftTree, TreeConfig

# The cache's slots are made for so many more tokens at a time.
TOKENS_AHEAD = 1024
# Tokens of plain rounds that wait for the draft: it reads them in one pass, which costs little more than one token's.
MISSED_TOKENS = 32
CATCH_UP = "catch up"


class LateEngine:
    """Runs an `Engine` round after round without waiting for any of them.

    Lengths, counts, flags and noise keys are read on the device, and the draft's catch-up pass always takes the
    longest path's rows, so that every round of one shape is the same work on the same buffers. One round more than
    needed runs at the end; finished rows emit nothing in it.

    Args:
        engine: one that has taken its first token; its state moves into the buffers of `rounds`.
        session: the draft's, started behind that token; None for plain decoding.
        shapes: says what shape each round has.
        rounds: buffers and graphs, this engine's alone. Behind `finish` they may serve another.
        features: [B, S, C], the prompt's; no more of them is read than what they are like.
    """

    def __init__(
        self,
        engine: Engine,
        session: FixedSession | None,
        shapes: ShapePolicy,
        rounds: KeptRounds,
        features: Tensor,
    ) -> None:
        self.engine = engine
        self.shapes = shapes
        self._session = session
        self._rounds = rounds
        self._device = engine.roots.device
        self._name = type(getattr(engine.target, "model", engine.target)).__name__
        trees = [shape for shape in shapes.menu if shape is not None]
        # What holds all shapes.
        self._largest = TreeConfig(
            depth=max((tree.depth for tree in trees), default=0),
            top_k=max((tree.top_k for tree in trees), default=1),
            total_tokens=max((tree.nodes for tree in trees), default=1),
        )
        self._path = max((tree.longest_path for tree in trees), default=1)
        self._reader = LateReader()
        self._longest = max(engine.cache.host_lengths)
        _settle(engine, rounds.buffers)
        self._missed = Missed(features, rounds.buffers)
        # Plain rounds since the draft was last up to date.
        self._plain_rounds = 0
        if session is not None:
            session.settle(rounds.buffers)
        if not self._make_room():
            self._fix()
        rounds.keep_equal(self._fingerprint())

    def step(self) -> RoundEvent | None:
        """Starts a round and returns the one before it, if there is one."""
        self._make_room()
        ready = {shape for shape in self.shapes.menu if self._replayed(shape).settled}
        shape = self.shapes.next(self.engine.transcript.tokens_left, ready)
        if self._plain_rounds and (shape is not None or self._plain_rounds == MISSED_TOKENS):
            self._run(CATCH_UP, self._catch_up)
            self._plain_rounds = 0
        # Before the capture the engine times its own phases.
        captured = self._replayed(shape).graph is not None
        with self.engine.stats.timed("replay") if captured else nullcontext():
            start = Moment(self._device)
            result = self._run(shape, partial(self._round, shape))
            span = (start, Moment(self._device)) if shape in ready else None
            self._reader.push(result, (shape, span))
            due = self._reader.due()
        self._plain_rounds += shape is None and self._session is not None
        return None if due is None else self._hear(due.rows, *due.note)

    def finish(self) -> KeptRounds:
        """The rounds, for another call."""
        self._rounds.leave()
        return self._rounds

    def _hear(self, rows: list[list[int]], shape: Shape, span: tuple[Moment, Moment] | None) -> RoundEvent:
        """Notes a round that is over."""
        heard = self.engine.read(rows, 1 if shape is None else shape.nodes)
        self.shapes.learn(shape, None if span is None else span[0].until(span[1]), heard.counts)
        transcript = self.engine.transcript
        lengths = zip(transcript.prompt_lengths, transcript.rows, strict=True)
        self._longest = max(prompt + len(emitted) for prompt, emitted in lengths)
        return RoundEvent(None, heard.paths, heard.emitted)

    def _round(self, shape: Shape) -> Tensor:
        """One round, and what the host wants to know of it."""
        engine, session = self.engine, self._session
        with engine.stats.timed("draft"):
            tree = DraftTree.root_only(engine.roots) if shape is None else session.propose(engine.roots, Plan(shape))
        accepted, features = engine.judge(tree)
        learned = engine.advance(accepted, None if session is None else features, None)
        if session is not None:
            with engine.stats.timed("draft"):
                self._missed.add(learned) if shape is None else session.commit(*learned)
        return accepted.packed()

    def _catch_up(self) -> Tensor:
        """Shows the draft what plain rounds have committed."""
        with self.engine.stats.timed("draft"):
            self._session.commit(*self._missed.all)
            return self._missed.all.counts.zero_()

    def _replayed(self, name: Shape | str) -> Replayed:
        return self._rounds.replayed(name, self._name, self._device)

    def _run(self, name: Shape | str, function: Callable[[], Tensor]) -> Tensor:
        return self._replayed(name)(function, self._fingerprint, self._rounds.pool)

    def _fingerprint(self) -> Fingerprint:
        target = self.engine.target
        return Fingerprint(self._rounds.buffers.moves, target.decoder, target.head, target.embedding, self._session)

    def _make_room(self) -> bool:
        """Sees to it that the rounds under way and the next one find slots; growing, which it returns, resets."""
        needed = self._longest + (LATE_ROUNDS + 2) * self._path
        if needed <= self._rounds.tokens:
            return False
        self._rounds.tokens = -(-(needed + TOKENS_AHEAD) // TOKENS_AHEAD) * TOKENS_AHEAD
        self._fix()
        self._rounds.reset()
        return True

    def _fix(self) -> None:
        """Hands the lengths to the device; caches grow where they have fewer slots than the rounds were made for."""
        tokens = self._rounds.tokens
        self.engine.cache.fix(tokens + self.engine.target.pass_rows(self._largest.nodes))
        if self._session is not None:
            self._session.fix(tokens + MISSED_TOKENS, self._largest)


class Missed:
    """What plain rounds committed and the draft has yet to learn, on the device, so that a graph can add to it.

    Attributes:
        all: up to `MISSED_TOKENS` tokens a row; the host sees to it that there are never more.
    """

    def __init__(self, features: Tensor, buffers: Buffers) -> None:
        batch, _, width = features.shape
        tokens = features.new_zeros(batch, MISSED_TOKENS, dtype=torch.int64)
        self.all = Committed(
            buffers.tensor("missed.features", features.new_zeros(batch, MISSED_TOKENS, width)),
            buffers.tensor("missed.tokens", tokens),
            buffers.tensor("missed.counts", tokens[:, 0].clone()),
            None,
        )

    def add(self, committed: Committed) -> None:
        """Notes one token of each row that goes on: [B, 1, C] features, [B, 1] tokens, [B] counts."""
        place = self.all.counts[:, None]
        self.all.features.scatter_(1, place[:, :, None].expand_as(committed.features), committed.features)
        self.all.tokens.scatter_(1, place, committed.tokens)
        self.all.counts.add_(committed.counts)


def _settle(engine: Engine, buffers: Buffers) -> None:
    """Moves all that rounds read and write, beside the weights, to where it outlives the call."""
    engine.cache = buffers.cache("round.cache", engine.cache)
    transcript, sampling = engine.transcript, engine.sampling
    for owner, name in (
        (engine, "roots"),
        (engine, "positions"),
        (engine, "end_tokens"),
        (transcript, "remaining"),
        (transcript, "finished"),
    ):
        setattr(owner, name, buffers.tensor(f"round.{name}", getattr(owner, name)))
    if sampling is not None:
        settings = sampling._asdict().items()
        engine.sampling = Sampling(**{name: buffers.tensor(f"sampling.{name}", value) for name, value in settings})
