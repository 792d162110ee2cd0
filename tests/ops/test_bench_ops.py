"""The op benchmark: every case has a right answer on every backend, and a wrong one never gets a time."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_ops
from benchmarks.ops import CASES, timing
from benchmarks.ops.case import Baseline, Case, Problem, WrongAnswer
from benchmarks.ops.timing import Ceilings, Timing
from vispec import ops
from vispec.ops import use_backend

CEILINGS = Ceilings(
    copy_gigabytes_per_second=2000.0, matmul_teraflops=500.0, smallest_kernel_microseconds=2.0, l2_bytes=1 << 20
)


def each_case():
    return pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.name}")


@pytest.mark.sanitize
@each_case()
def test_the_answer_is_right(backend, case):
    with use_backend(None if backend.name == "cuda" else backend.name):
        problem = case.problem(backend.device, small=True)
        assert problem.check() <= problem.error_bound
        # Again, as the replays of a graph do: nothing may be left over from the first time.
        assert problem.check() <= problem.error_bound


@each_case()
def test_an_op_that_does_nothing_is_noticed(case, monkeypatch):
    problem = case.problem("cpu", small=True)
    monkeypatch.setattr(ops, case.op, lambda *_, **__: None)
    with pytest.raises(WrongAnswer):
        problem.check()


@each_case()
def test_every_output_is_compared(case):
    """One value changed in any output is noticed."""
    problem = case.problem("cpu", small=True)
    for index in range(len(problem.outputs)):
        problem.check()
        output = problem.outputs[index]
        place = tuple(size - 1 for size in output.shape)
        output[place] = output[place] + (0.3 * output.abs().max() + 0.1 if output.is_floating_point() else 1)
        with pytest.raises(WrongAnswer):
            error = problem.error()
            if error > problem.error_bound:
                raise WrongAnswer


@each_case()
def test_the_baselines_compute_the_same(case):
    problem = case.problem("cpu", small=True)
    assert problem.baselines
    for baseline in problem.baselines:
        if not baseline.compiles:
            problem.check_baseline(baseline, baseline.prepare())


@each_case()
def test_each_set_of_inputs_has_values_of_its_own(case):
    one, other = (case.problem("cpu", small=True, seed=seed) for seed in (0, 1))
    one.check()
    other.check()
    assert any(not torch.equal(a, b) for a, b in zip(one.outputs, other.outputs, strict=True))


def doubling(error: float = 0.0, baselines: list[Baseline] | None = None, cold: bool = False) -> Case:
    """A case of one small op, off by `error`."""

    def make(device, generator, n):
        values = torch.rand(n, generator=generator)
        written = torch.empty(n)

        def run():
            written.copy_(2 * values + error)

        return Problem(
            run=run,
            outputs=[written],
            error=lambda: float((written.double() - 2 * values.double()).abs().max()),
            error_bound=1e-6,
            bytes_moved=400_000,
            operations=30_000_000,
            baselines=baselines or [],
        )

    return Case("double", "n=3", make, {"n": 3}, {"n": 2}, cold=cold, target_microseconds=4.0)


@pytest.fixture
def measure(monkeypatch):
    """Runs a case on the CPU, with a clock that says 5 microseconds and counts the sets of inputs."""
    seen = []

    def clock(calls, replays):
        seen.append(len(calls))
        for call in calls:
            call()
        return Timing(5.0, 4.0, 6.0, len(calls), replays)

    monkeypatch.setattr(bench_ops, "time_calls", clock)
    original = Case.problem
    monkeypatch.setattr(Case, "problem", lambda self, device, **named: original(self, "cpu", **named))

    def run(case, deadline=float("inf")):
        saved = []
        bench = bench_ops.Bench(CEILINGS, 7, deadline, lambda rows: saved.append(json.dumps(rows)))
        bench.run([case])
        assert json.loads(saved[-1]) == bench.rows
        return bench.rows[0], seen

    return run


def test_a_row_holds_the_time_and_what_it_is_worth(measure):
    row, seen = measure(doubling())
    assert seen == [1]
    assert row["microseconds"] == 5.0 and row["target_microseconds_h100"] == 4.0
    # 400 kB at 2 TB/s take 0.2 us, 30 MFLOP at 500 TFLOP/s take 0.06 us.
    assert row["floor_microseconds"] == pytest.approx(0.2) and row["floor_set_by"] == "bytes"
    assert row["times_over_floor"] == pytest.approx(25)
    assert row["gigabytes_per_second"] == pytest.approx(80)
    assert row["share_of_copy_bandwidth"] == pytest.approx(0.04)
    assert row["largest_error"] <= 1e-6 and row["l2_cache"].startswith("warm")
    assert bench_ops.table([row], CEILINGS).row_count == 1


def test_cold_inputs_take_turns(measure):
    row, seen = measure(doubling(cold=True))
    # 3 MiB of inputs at least lie between two turns of one set of 400 kB.
    assert seen == [9] and row["l2_cache"] == "cold: 9 sets of inputs take turns"


def test_the_larger_floor_counts():
    assert CEILINGS.floor(2_000_000, 0) == (pytest.approx(1.0), "bytes")
    assert CEILINGS.floor(2_000_000, 1_000_000_000) == (pytest.approx(2.0), "operations")


@pytest.mark.parametrize("error", [0.1, torch.nan])
def test_a_wrong_answer_gets_no_time(measure, error):
    row, seen = measure(doubling(error))
    assert row["failed"].startswith("WrongAnswer: the largest error is") and "microseconds" not in row
    assert seen == []
    assert bench_ops.table([row], CEILINGS).row_count == 1


def test_a_baseline_that_fails_is_recorded_with_its_reason(measure):
    def missing():
        raise ModuleNotFoundError("No module named 'flashinfer'\nsecond line")

    baselines = [
        Baseline("absent", missing, lambda _: 0.0),
        Baseline("wrong", lambda: lambda: None, lambda _: 0.5),
        Baseline("coarse", lambda: lambda: None, lambda _: 9e-6),
        Baseline("slow", lambda: lambda: None, lambda _: 0.0, compiles=True),
    ]
    row, _ = measure(doubling(baselines=baselines))
    absent, wrong, coarse, slow = row["baselines"]
    assert absent == {"name": "absent", "failed": "ModuleNotFoundError: No module named 'flashinfer'"}
    assert wrong["failed"].startswith("WrongAnswer") and "microseconds" not in wrong
    assert coarse["microseconds"] == slow["microseconds"] == 5.0
    row, _ = measure(doubling(baselines=baselines), deadline=0.0)
    assert row["baselines"][3]["failed"].startswith("not run: the time allowed")
    assert row["baselines"][2]["microseconds"] == 5.0


def test_without_kernels_it_says_so_and_ends_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(bench_ops, "backends", lambda: {"reference": "cpu"})
    monkeypatch.setattr("sys.argv", ["bench_ops"])
    assert bench_ops.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_check_fails_where_an_answer_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(bench_ops, "backends", lambda: {"reference": "cpu"})
    monkeypatch.setattr("sys.argv", ["bench_ops", "--check"])
    monkeypatch.setattr(bench_ops, "CASES", [doubling()])
    assert bench_ops.main() == 0
    monkeypatch.setattr(bench_ops, "CASES", [doubling(), doubling(error=0.1)])
    assert bench_ops.main() == 1
    assert "FAILED: WrongAnswer" in capsys.readouterr().out


def test_an_unknown_name_lists_the_known_ones(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_ops", "--only", "nothing"])
    with pytest.raises(SystemExit, match="--only must match one of accept, .*commit, grow_level"):
        bench_ops.main()


def test_a_record_is_named_after_the_gpu():
    assert bench_ops.record_name("NVIDIA H100 80GB HBM3") == "ops_h100_80gb_hbm3.json"
    assert bench_ops.record_name("NVIDIA GeForce RTX 4090 (x)") == "ops_geforce_rtx_4090_x.json"


class PretendCuda:
    """The parts of torch.cuda that a timing uses, with a clock that only kernels and launches move."""

    LAUNCH = 40.0

    def __init__(self):
        self.now, self.idle, self.captured = 0.0, True, None

    def kernel(self, microseconds):
        """A call that launches one kernel."""

        def call():
            if self.captured is not None:
                self.captured.append(microseconds)
            else:
                self.now += self.LAUNCH + microseconds

        return call

    def Stream(self):  # noqa: N802
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self):
        return None

    @contextmanager
    def stream(self, stream):
        yield

    def Event(self, enable_timing):  # noqa: N802
        event = SimpleNamespace()

        def record(stream):
            event.at = self.now

        def synchronize():
            self.idle = True

        event.record, event.synchronize = record, synchronize
        event.elapsed_time = lambda other: (other.at - event.at) / 1000
        return event

    def CUDAGraph(self):  # noqa: N802
        graph = SimpleNamespace(kernels=[])

        def replay():
            # A launch shows only where the GPU has nothing to do meanwhile.
            self.now += sum(graph.kernels) + (self.LAUNCH if self.idle else 0)
            self.idle = False

        graph.replay = replay
        return graph

    @contextmanager
    def graph(self, graph, stream):
        self.captured = graph.kernels
        yield
        self.captured = None


@pytest.mark.parametrize(("kernels", "calls"), [([3.0], 50), ([1.0, 5.0] * 12, 72), ([7000.0], 50), ([3.0] * 300, 300)])
def test_a_time_is_that_of_the_kernels_without_launches(kernels, calls, monkeypatch):
    cuda = PretendCuda()
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda))
    found = timing.time_calls([cuda.kernel(microseconds) for microseconds in kernels], replays=5)
    assert found.microseconds == pytest.approx(sum(kernels) / len(kernels))
    assert found.fastest == pytest.approx(found.slowest) and found.replays == 5
    # All calls take turns, equally often.
    assert found.calls == calls


def test_a_call_that_fails_is_not_timed(monkeypatch):
    cuda = PretendCuda()
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda))

    def broken():
        raise RuntimeError("cannot be captured")

    with pytest.raises(RuntimeError, match="cannot be captured"):
        timing.time_calls([broken], replays=1)
