"""Where a round's time goes, without a synchronisation in it: marks on the stream, read when all is over."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.engine.floors import PHASES
from vispec.decode import replay
from vispec.decode.stats import GenerationStats

# What the engine calls the blocks of a round; the catch-up of the draft is the last.
BLOCKS = ("draft", "verify", "accept", "accept", "draft")
PACING = "pacing"  # what the replay draft does that no draft would
# Libraries choose algorithms in the first rounds.
LEFT_OUT_ROUNDS = 2
TRACED_ROUNDS = 3
# Tens of milliseconds, in which the host queues a round of a few hundred kernels.
HOLD_CYCLES = 60_000_000


class HostClock:
    """For a CPU, where work is done when its call returns."""

    mark = staticmethod(time.perf_counter)

    def hold(self) -> None:
        """Nothing runs behind the host's back."""

    def held(self) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class DeviceClock:
    """Events on the current stream of a GPU.

    `hold` lets the device wait while the host queues what is to be timed. The kernels then follow one another as they
    do in a captured round, and no launch is in the time.
    """

    def __init__(self) -> None:
        self._holding: torch.cuda.Event | None = None

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def hold(self) -> None:
        torch.cuda._sleep(HOLD_CYCLES)
        self._holding = torch.cuda.Event()
        self._holding.record()

    def held(self) -> bool:
        """Whether the device still waits: all that was queued since `hold` was queued in time."""
        return not self._holding.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Waits for the second of two marks."""
        end.synchronize()
        return start.elapsed_time(end) / 1e3


Clock = HostClock | DeviceClock


def clock_of(device: torch.device) -> Clock:
    """The clock that tells the time on a device."""
    return DeviceClock() if device.type == "cuda" else HostClock()


def mean_seconds(call: Callable[[], Any], clock: Clock, calls: int = 5) -> tuple[float, bool]:
    """The mean time of a call, and whether each was queued in full before the device began with it."""
    call()
    spent, held = 0.0, True
    for _ in range(calls):
        # Held back one by one: a device's queue takes about a thousand kernels, then the host waits.
        clock.hold()
        start = clock.mark()
        call()
        end = clock.mark()
        held &= clock.held()
        spent += clock.seconds(start, end)
    return spent / calls, held


class PhaseClock:
    """Times the phases of rounds that run call by call, of one generation.

    The engine's own blocks are marked at both ends. What lies between them, and the packing of the result, is "rest".

    Args:
        on_round: called before each round.
    """

    def __init__(self, clock: Clock, on_round: Callable[[], None] = lambda: None) -> None:
        self._clock = clock
        self._on_round = on_round
        self._previous = ""
        self._rounds: list[dict[str, tuple[Any, Any]]] = []
        self._ends: list[Any] = []
        self._held: list[bool] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Rounds of the block are timed and never captured; they must not find earlier calls' rounds, nor be found."""
        timed = mock.patch.object(GenerationStats, "timed", lambda stats, name: self._block(name))
        with timed, mock.patch.object(replay, "can_capture", lambda device: False):
            yield

    @contextmanager
    def pacing(self) -> Iterator[None]:
        """Marks the work of the replay draft itself, inside a phase."""
        with self._marked(PACING):
            yield

    @contextmanager
    def _block(self, name: str) -> Iterator[None]:
        # The session's start and the catch-up of the round before are "draft" too.
        if name == self._previous == "draft":
            self._begin()
        self._previous = name
        if not self._rounds:
            yield
            return
        place = len(self._rounds[-1].keys() - {PACING})
        if place == len(BLOCKS) or BLOCKS[place] != name:
            raise RuntimeError(f"phases: block {place + 1} of a round must be one of {', '.join(BLOCKS)}, got {name}")
        with self._marked(PHASES[place]):
            yield
        if place + 1 == len(BLOCKS):
            self._held.append(self._clock.held())

    @contextmanager
    def _marked(self, name: str) -> Iterator[None]:
        start = self._clock.mark()
        with torch.profiler.record_function(f"round: {name}"):
            yield
        if self._rounds:
            self._rounds[-1][name] = start, self._clock.mark()

    def _begin(self) -> None:
        if self._rounds:
            self._ends.append(self._clock.mark())
        self._on_round()
        self._clock.hold()
        self._rounds.append({})

    def seconds(self) -> dict[str, float]:
        """Mean seconds of each phase, of "pacing" and "rest"; together they are a round.

        Raises: RuntimeError where there were too few rounds.
        """
        # The last round has no end.
        whole = list(zip(self._rounds, self._ends, strict=False))[LEFT_OUT_ROUNDS:]
        if not whole:
            raise RuntimeError(f"phases: more than {LEFT_OUT_ROUNDS + 1} rounds are needed, got {len(self._rounds)}")
        found = dict.fromkeys((*PHASES, PACING, "rest"), 0.0)
        for marks, end in whole:
            spent = {name: self._clock.seconds(*pair) for name, pair in marks.items()}
            spent["rest"] = self._clock.seconds(marks[PHASES[0]][0], end) - sum(spent[name] for name in PHASES)
            # Pacing runs inside the first phase.
            spent[PHASES[0]] -= spent.get(PACING, 0.0)
            for name, value in spent.items():
                found[name] += value / len(whole)
        return found

    @property
    def held(self) -> float:
        """The share of those rounds that the host had queued before the device began; below 1 launches are in them."""
        counted = self._held[LEFT_OUT_ROUNDS : len(self._ends)]
        return sum(counted) / len(counted)


class ReplayClock:
    """Times rounds that are replayed as CUDA graphs: on the device as a whole, and what the host does in each.

    The host's time of a round is what lies between two replays, less its waiting for a result and what this clock
    itself takes.
    """

    def __init__(self, on_round: Callable[[], None] = lambda: None) -> None:
        self._on_round = on_round
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._starts: list[float] = []
        # Seconds of the host that are none of the round's, up to each of the starts.
        self._apart = 0.0
        self._apart_at: list[float] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Replays inside the block are timed."""
        replay, synchronize = torch.cuda.CUDAGraph.replay, torch.cuda.Event.synchronize
        clock = DeviceClock()

        def timed_replay(captured: torch.cuda.CUDAGraph) -> None:
            with self._outside():
                self._on_round()
                start = clock.mark()
            self._starts.append(time.perf_counter())
            self._apart_at.append(self._apart)
            replay(captured)
            with self._outside():
                self._marks.append((start, clock.mark()))

        def timed_wait(event: torch.cuda.Event) -> None:
            with self._outside():
                synchronize(event)

        with (
            mock.patch.object(torch.cuda.CUDAGraph, "replay", timed_replay),
            mock.patch.object(torch.cuda.Event, "synchronize", timed_wait),
        ):
            yield

    @contextmanager
    def _outside(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._apart += time.perf_counter() - started

    @property
    def rounds(self) -> int:
        """Rounds that were replayed."""
        return len(self._starts)

    def device_seconds(self) -> float | None:
        """Median time of a replay on the device; None without any."""
        clock = DeviceClock()
        return statistics.median(clock.seconds(*pair) for pair in self._marks) if self._marks else None

    def host_seconds(self) -> float | None:
        """Median time that the host works in a round; None with fewer than two replays."""
        if self.rounds < 2:
            return None
        at = [started - apart for started, apart in zip(self._starts, self._apart_at, strict=True)]
        return statistics.median(after - before for before, after in zip(at, at[1:], strict=False))


@contextmanager
def trace(path: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Writes a few rounds as a Chrome trace (chrome://tracing, Perfetto); gives what is to be called before each round.

    Raises: RuntimeError where there were too few rounds to write any.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    schedule = torch.profiler.schedule(wait=LEFT_OUT_ROUNDS, warmup=1, active=TRACED_ROUNDS, repeat=1)
    with torch.profiler.profile(
        activities=activities,
        schedule=schedule,
        on_trace_ready=lambda found: found.export_chrome_trace(str(path)),
    ) as profile:
        yield profile.step
    if not path.is_file():
        raise RuntimeError(f"profile: more than {LEFT_OUT_ROUNDS + 1} rounds are needed for {path.name}")
