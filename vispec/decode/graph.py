"""Rounds of which the host knows nothing until they are over: one CUDA graph each, read one round late."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from vispec.decode.round import Engine, RoundEvent
from vispec.drafts.base import FixedSession, Plan
from vispec.tree import DraftTree

# Rounds that run call by call before the capture, in which libraries choose algorithms and allocate workspaces.
WARM_UP_ROUNDS = 2
# Rounds under way whose result the host does not yet ask for.
LATE_ROUNDS = 1
# The cache's slots are made for so many more tokens at a time.
TOKENS_AHEAD = 1024


class LateEngine:
    """Runs an `Engine` round after round without waiting for any of them.

    Lengths, counts, flags and noise keys are read on the device, and the draft's catch-up pass always takes the
    longest path's rows, so that every round is the same work on the same buffers. One round more than needed runs
    at the end; finished rows emit nothing in it.

    Args:
        engine: one that has taken its first token.
        session: the draft's, started behind that token; None for plain decoding.
        plan: what every round asks of the draft.
        capture: replay rounds as CUDA graphs; False runs the same work call by call, on any device.
    """

    def __init__(self, engine: Engine, session: FixedSession | None, plan: Plan, *, capture: bool) -> None:
        self.engine = engine
        self._session = session
        self._plan = plan
        self._nodes, self._path = (1, 1) if session is None else (plan.tree.nodes, plan.tree.longest_path)
        self.round = Replayed(self._run, type(getattr(engine.target, "model", engine.target)).__name__, capture)
        self._reader = LateReader()
        self._longest = max(engine.cache.host_lengths)
        self._tokens = 0
        self._make_room()

    def step(self) -> RoundEvent | None:
        """Starts a round and returns the one before it, if there is one."""
        self._make_room()
        # Before the capture the engine times its own phases.
        with self.engine.stats.timed("replay") if self.round.captured else nullcontext():
            self._reader.push(self.round())
            rows = self._reader.due()
        if rows is None:
            return None
        heard = self.engine.read(rows, self._nodes)
        transcript = self.engine.transcript
        lengths = zip(transcript.prompt_lengths, transcript.rows, strict=True)
        self._longest = max(prompt + len(emitted) for prompt, emitted in lengths)
        return RoundEvent(None, heard.paths, heard.emitted)

    def _run(self) -> Tensor:
        engine, session = self.engine, self._session
        with engine.stats.timed("draft"):
            if session is None:
                tree = DraftTree.root_only(engine.roots)
            else:
                tree = session.propose(engine.roots, self._plan)
        accepted, features = engine.judge(tree)
        learned = engine.advance(accepted, None if session is None else features, None)
        if session is not None:
            with engine.stats.timed("draft"):
                session.commit(*learned)
        return accepted.packed()

    def _make_room(self) -> None:
        """Sees to it that the rounds under way and the next one find slots; growing forgets the graph."""
        needed = self._longest + (LATE_ROUNDS + 2) * self._path
        if needed <= self._tokens:
            return
        self._tokens = -(-(needed + TOKENS_AHEAD) // TOKENS_AHEAD) * TOKENS_AHEAD
        self.engine.cache.fix(self._tokens + self._nodes)
        if self._session is not None:
            self._session.fix(self._tokens, self._plan.tree)
        self.round.reset()


class LateReader:
    """Copies small int64 tensors of one shape to the host while the device goes on."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def push(self, result: Tensor) -> None:
        """Enqueues the copy of `result` behind the work that makes it."""
        place = self._free.pop() if self._free else torch.empty_like(result, device="cpu", pin_memory=result.is_cuda)
        place.copy_(result, non_blocking=True)
        event = None
        if result.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending.append((place, event))

    def due(self) -> list[list[int]] | None:
        """The oldest result once more than `LATE_ROUNDS` are under way, else None; waits for that one alone."""
        if len(self._pending) <= LATE_ROUNDS:
            return None
        place, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        self._free.append(place)
        return place.tolist()


class Replayed:
    """A function over buffers that stay where they are, captured as a CUDA graph after its first calls.

    Where the work cannot be captured (a model that reads a value back in its forward pass, for example) it goes on
    call by call, and a warning says so.

    Attributes:
        captured: whether calls are replayed from a graph by now.
    """

    def __init__(self, function: Callable[[], Tensor], name: str, capture: bool) -> None:
        self._function = function
        self._name = name
        self._capture = capture
        self.reset()

    def reset(self) -> None:
        """Forgets the graph, because buffers have moved."""
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self) -> Tensor:
        self._calls += 1
        if self._graph is None and self._capture and self._calls > WARM_UP_ROUNDS:
            self._try_capture()
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result

    def _try_capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = self._function()
        except RuntimeError as error:
            self._capture = False
            warnings.warn(
                f"fast_generate: a round of {self._name} cannot be captured as a CUDA graph; it runs call by call, "
                f"with the same answers ({str(error).splitlines()[0]})",
                stacklevel=2,
            )
            return
        self._graph, self._result = graph, result
