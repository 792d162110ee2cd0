"""How bench_engine times a round: which marks make a phase, what is left out, and what a trace holds."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import vispec
from benchmarks.engine import clocks
from benchmarks.engine.case import Case
from benchmarks.engine.clocks import (
    LEFT_OUT_ROUNDS,
    PACING,
    TRACED_ROUNDS,
    HostClock,
    PhaseClock,
    ReplayClock,
    clock_of,
)
from benchmarks.engine.floors import PHASES, Setting
from benchmarks.engine.replay import PacedDraft, PacedSession
from benchmarks.engine.targets import TINY_SHAPES
from tests.ops.conftest import available
from tests.tape import Captures
from vispec.decode import replay
from vispec.decode.stats import GenerationStats
from vispec.ops.backend import use_backend


class CountingClock:
    """Each mark comes one second after the one before; the device was held in every round but the one named."""

    def __init__(self, late_round: int = -1) -> None:
        self.late_round = late_round
        self.holds = 0
        self.held_asked = 0
        self._seconds = itertools.count()

    def mark(self) -> int:
        return next(self._seconds)

    def hold(self) -> None:
        self.holds += 1

    def held(self) -> bool:
        self.held_asked += 1
        return self.held_asked != self.late_round

    def seconds(self, start: int, end: int) -> int:
        return end - start


@pytest.fixture(scope="module")
def case() -> Case:
    shape = TINY_SHAPES["tiny-llava"]
    return Case(shape, shape.build(torch.float32, "cpu"), Setting(24, 24, 2), 16)


def watched(case: Case, clock) -> PhaseClock:
    phases = PhaseClock(clock)
    case._watch(phases)
    return phases


def test_phases_pacing_and_rest_are_the_whole_round(case):
    clock = CountingClock(late_round=4)
    phases = watched(case, clock)
    # Ten marks at the ends of five phases, two inside the first, one at the end of the round.
    expected = {"draft levels": 2, "verify": 1, "accept": 1, "commit": 1, "draft catch-up": 1, PACING: 1, "rest": 5}
    assert phases.seconds() == pytest.approx(expected)
    assert sum(expected.values()) == 12
    rounds = clock.holds
    assert clock.held_asked == rounds > LEFT_OUT_ROUNDS + 2
    counted = rounds - 1 - LEFT_OUT_ROUNDS
    assert phases.held == pytest.approx((counted - 1) / counted)


def test_on_a_cpu_the_phases_fill_the_round(case):
    found = watched(case, HostClock()).seconds()
    assert set(found) == {*PHASES, PACING, "rest"}
    assert all(value > 0 for value in found.values())
    assert found["rest"] < sum(found.values()) / 2


def test_watched_rounds_are_not_captured_and_all_is_as_before(case, monkeypatch):
    made, timed = Captures(), GenerationStats.timed
    monkeypatch.setattr(replay, "can_capture", lambda device: True)
    monkeypatch.setattr(replay, "capture", made)
    with use_backend("reference"):
        case.speculate(case.tokens)
        before = made.count
        assert before
        # Not even by a graph that an earlier call has left.
        watched(case, CountingClock())
        assert made.count == before and GenerationStats.timed is timed
        # Nor does a later call take over the watched rounds, which were never to be captured.
        stats = case.speculate(case.tokens)
        assert made.count > before
    assert stats.draft_seconds > 0 and stats.verify_seconds > 0


@pytest.mark.parametrize(("late", "in_time"), [(-1, True), (3, False)])
def test_calls_are_held_back_one_by_one(late, in_time):
    clock, calls = CountingClock(late), []

    def call() -> None:
        # As many calls so far, so many seconds.
        calls.append([clock.mark() for _ in range(len(calls))])

    # Marks inside a call are seconds on this clock: 1 to 4 of them, and one for the end.
    assert clocks.mean_seconds(call, clock, calls=4) == ((2 + 3 + 4 + 5) / 4, in_time)
    assert (len(calls), clock.holds, clock.held_asked) == (5, 4, 4)


def test_a_round_of_another_order_is_an_error():
    phases = PhaseClock(CountingClock())
    with phases.watching():
        stats = GenerationStats()
        for name in ("prefill", "accept", "draft", "draft", "verify"):
            with stats.timed(name):
                pass
        with pytest.raises(RuntimeError, match="block 3 of a round must be one of draft, verify, accept.*, got verify"):
            with stats.timed("verify"):
                pass


def test_too_few_rounds_are_an_error(case, tmp_path):
    phases = PhaseClock(CountingClock())
    with phases.watching(), pytest.raises(RuntimeError, match="more than 3 rounds are needed, got 0"):
        phases.seconds()
    few = Case(case.shape, case.model, case.setting, 2)
    with pytest.raises(RuntimeError, match="more than 3 rounds are needed for x_calls.json"):
        few.profile(tmp_path, "x")
    assert few.draft.pacing is not phases.pacing


class FakeGpu:
    """Time passes as the calls say."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda captured: self.spend(3))
        monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: self.spend(100))
        monkeypatch.setattr(clocks, "DeviceClock", lambda: self)

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def mark(self) -> float:
        self.spend(7)
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start


def test_the_hosts_time_leaves_out_waiting_and_the_clock_itself(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    replay, synchronize = torch.cuda.CUDAGraph.replay, torch.cuda.Event.synchronize
    rounds = []
    watch = ReplayClock(lambda: (rounds.append(1), gpu.spend(11)))
    with watch.watching():
        for number in range(4):
            torch.cuda.CUDAGraph.replay(None)
            gpu.spend(5 if number else 50)
            torch.cuda.Event.synchronize(None)
    assert watch.rounds == len(rounds) == 4
    # The launch and what follows it; the first round's 50 do not move the median.
    assert watch.host_seconds() == 3 + 5
    # The launch and the second mark, which this device takes 7 for.
    assert watch.device_seconds() == 3 + 7
    assert torch.cuda.CUDAGraph.replay is replay and torch.cuda.Event.synchronize is synchronize


def test_without_replays_there_is_no_time(case):
    watch = ReplayClock()
    with watch.watching():
        case.speculate(4)
    assert (watch.rounds, watch.host_seconds(), watch.device_seconds()) == (0, None, None)


@pytest.mark.gpu
def test_on_a_gpu_events_time_the_phases_and_the_replays(tmp_path):
    device = available("cuda").device
    shape = replace(TINY_SHAPES["tiny-llava"], hidden=128, heads=2, groups=1, head_width=64)
    case = Case(shape, shape.build(torch.bfloat16, device), Setting(24, 24, 2), 48)
    phases = watched(case, clock_of(case.model.device))
    found = phases.seconds()
    assert all(value > 0 for value in found.values()) and 0 <= phases.held <= 1
    replays = ReplayClock()
    with replays.watching():
        case.speculate(48)
    assert replays.rounds > 5 and replays.device_seconds() > 0 and replays.host_seconds() > 0
    assert [path.is_file() for path in case.profile(tmp_path, "x")] == [True, True]


def test_a_trace_holds_a_few_rounds_and_their_phases(case, tmp_path):
    (path,) = case.profile(tmp_path / "new", "tiny_24_2")
    assert path == tmp_path / "new" / "tiny_24_2_calls.json"
    events = json.loads(path.read_text())["traceEvents"]
    names = Counter(event.get("name", "") for event in events if event.get("ph") == "X")
    assert {name: names[f"round: {name}"] for name in (*PHASES, PACING)} == dict.fromkeys(
        (*PHASES, PACING), TRACED_ROUNDS
    )
    # Phases hold the work, not just their names.
    assert names["aten::linear"] > TRACED_ROUNDS


@pytest.mark.parametrize(("depth", "top_k", "total"), [(3, 8, 30), (0, 4, 4), (6, 10, 128), (1, 1, 3), (3, 8, 1)])
def test_the_paced_tree_is_a_tree_with_one_long_path(case, depth, top_k, total):
    config = vispec.TreeConfig(depth, top_k, total)
    draft = PacedDraft(case.real, torch.zeros(1, 4, dtype=torch.int64), 1.0, config)
    session = PacedSession(draft, None, config, 100)
    parents = session.parents.tolist()
    assert parents[0] == -1 and all(0 <= parent < node for node, parent in enumerate(parents) if node)
    seen = torch.zeros(config.nodes, config.nodes, dtype=torch.bool)
    for node, parent in enumerate(parents):
        seen[node, node] = True
        if node:
            seen[node] |= seen[parent]
        assert session.depths[node] == seen[node].sum() - 1
    tree = SimpleNamespace(size=config.nodes, tokens=session.parents[None], ancestors=session.ancestors[None])
    assert torch.equal(vispec.tree.DraftTree.mask(tree)[0], seen)
    assert int(session.depths.max()) == config.longest_path - 1
    assert int(session.on_path.sum()) == config.longest_path
    if (depth, total) == (3, 30):
        assert session.on_path.nonzero()[:, 0].tolist() == [0, 7, 14, 21, 28]
