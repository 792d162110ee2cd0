"""The kernels against the hardware's limits and against PyTorch, SDPA, FlexAttention and FlashInfer.

    python -m benchmarks.bench_ops                      # every case, on a GPU
    python -m benchmarks.bench_ops --quick --json       # fewer repeats, and benchmarks/results/ops_<gpu>.json
    python -m benchmarks.bench_ops --only accept        # the cases whose op or name contains the word
    python -m benchmarks.bench_ops --check              # the answers alone, small, on every backend that is there

A time is printed only after the answer was checked against float64. It is the median of replays of a CUDA graph that
holds many calls. Inputs that come from device memory in a round take turns with others, so that the L2 cache does not
hold them; inputs that the kernel before has just written stay in it.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ops import CASES
from benchmarks.ops.case import Baseline, Case, Problem, forget_compiled
from benchmarks.ops.timing import Ceilings, measure_ceilings, time_calls
from benchmarks.record import gpu_state, write
from vispec import _native, ops

RESULTS = Path(__file__).resolve().parent / "results"
NO_DEVICE = 2
console = Console()


def chosen(only: str | None) -> list[Case]:
    """The cases whose op or name contains a word."""
    found = [case for case in CASES if only is None or only in f"{case.op} {case.name}"]
    if not found:
        raise SystemExit(f"bench_ops: --only must match one of {', '.join(sorted({case.op for case in CASES}))}")
    return found


def backends() -> dict[str, str]:
    """The backends that exist here, each with the device of its tensors."""
    found = {"reference": "cpu"}
    if _native.extension is not None:
        found["native"] = "cpu"
    try:
        _native.emulated("bench_ops")
        found["emulated"] = "cpu"
    except RuntimeError:
        pass
    if torch.cuda.is_available() and ops.build_info().get("cuda"):
        found["cuda"] = "cuda"
    return found


def check(cases: list[Case]) -> int:
    """Every case at its small size on every backend; returns how many gave a wrong answer."""
    failures = 0
    for name, device in backends().items():
        for case in cases:
            with ops.use_backend(None if name == "cuda" else name):
                try:
                    text = f"error {case.problem(device, small=True).check():.2g}"
                except Exception as error:
                    text = f"FAILED: {reason(error)}"
                    failures += 1
            console.print(f"{name}: {case.op}, {case.name}: {text}", markup=False, highlight=False)
    return failures


def reason(error: BaseException) -> str:
    """An exception as one line of a record."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"[:300]


class Bench:
    """One run: the rows found so far, and until when slow baselines may start."""

    def __init__(self, ceilings: Ceilings, replays: int, deadline: float, save: Callable[[list[dict]], None]) -> None:
        self.ceilings, self.replays, self.deadline, self.save = ceilings, replays, deadline, save
        self.rows: list[dict[str, Any]] = []

    def problems(self, case: Case) -> list[Problem]:
        """The case once, or as often as it takes to keep its inputs out of the cache."""
        first = case.problem("cuda")
        count = self.ceilings.copies_for_cold(first.bytes_moved) if case.cold else 1
        return [first, *(case.problem("cuda", seed=seed) for seed in range(1, count))]

    def measure(self, case: Case) -> None:
        """The op itself and the baselines that need no compiler; a wrong answer leaves a row without a time."""
        row: dict[str, Any] = {"op": case.op, "case": case.name, "sizes": case.sizes}
        self.rows.append(row)
        try:
            problems = self.problems(case)
            error = problems[0].check()
            timing = time_calls([problem.run for problem in problems], self.replays)
            row |= self._figures(case, problems, error) | asdict(timing)
            row |= self._against_limits(problems[0], timing.microseconds)
        except Exception as failure:
            row["failed"] = reason(failure)
            return
        row["baselines"] = self._baselines(problems, compiles=False)

    def measure_compiled(self, case: Case, row: dict[str, Any]) -> None:
        """The baselines that compile first, as long as there is time."""
        forget_compiled()
        if "failed" not in row:
            row["baselines"] += self._baselines(self.problems(case), compiles=True)

    def _figures(self, case: Case, problems: list[Problem], error: float) -> dict[str, Any]:
        cold = f"cold: {len(problems)} sets of inputs take turns"
        return {
            "l2_cache": cold if case.cold else "warm: one set of inputs, as the kernel before leaves it",
            "largest_error": error,
            "error_bound": problems[0].error_bound,
            "target_microseconds_h100": case.target_microseconds,
        }

    def _against_limits(self, problem: Problem, microseconds: float) -> dict[str, Any]:
        floor, limit = self.ceilings.floor(problem.bytes_moved, problem.operations)
        rate = problem.bytes_moved / microseconds / 1000
        return {
            "bytes_moved": problem.bytes_moved,
            "operations": problem.operations,
            "gigabytes_per_second": rate,
            "share_of_copy_bandwidth": rate / self.ceilings.copy_gigabytes_per_second,
            "floor_microseconds": floor,
            "floor_set_by": limit,
            "times_over_floor": microseconds / floor,
        }

    def _baselines(self, problems: list[Problem], compiles: bool) -> list[dict[str, Any]]:
        found = []
        for index, baseline in enumerate(problems[0].baselines):
            if baseline.compiles == compiles:
                alike = [problem.baselines[index] for problem in problems]
                found.append({"name": baseline.name, **self._baseline(problems[0], alike)})
        return found

    def _baseline(self, problem: Problem, alike: list[Baseline]) -> dict[str, Any]:
        """A time, or why there is none."""
        if alike[0].compiles and time.monotonic() > self.deadline:
            return {"failed": "not run: the time allowed for the benchmark was over"}
        try:
            calls = [baseline.prepare() for baseline in alike]
            error = problem.check_baseline(alike[0], calls[0])
            return {"largest_error": error, **asdict(time_calls(calls, self.replays))}
        except Exception as failure:
            return {"failed": reason(failure)}

    def run(self, cases: list[Case]) -> None:
        """Every case, quick baselines first: what is cut off is the least."""
        for case in cases:
            self.measure(case)
            console.print(line(self.rows[-1]), markup=False, highlight=False)
            self.save(self.rows)
        for case, row in zip(cases, list(self.rows), strict=True):
            self.measure_compiled(case, row)
            self.save(self.rows)


def line(row: dict[str, Any]) -> str:
    """One row while the benchmark runs."""
    title = f"{row['op']}, {row['case']}"
    if "failed" in row:
        return f"{title}: FAILED: {row['failed']}"
    return f"{title}: {row['microseconds']:.2f} us, {row['times_over_floor']:.1f} times the floor"


def table(rows: list[dict[str, Any]], ceilings: Ceilings) -> Table:
    """The figures for people."""
    title = (
        f"microseconds; copy {ceilings.copy_gigabytes_per_second:.0f} GB/s, matmul {ceilings.matmul_teraflops:.0f} "
        f"TFLOP/s, smallest kernel {ceilings.smallest_kernel_microseconds:.2f} us"
    )
    shown = Table(title=title)
    for column in ("op", "case", "time", "floor", "times", "copy share", "target", "error", "baselines"):
        shown.add_column(column, justify="left" if column in ("op", "case", "baselines") else "right")
    for row in rows:
        if "failed" in row:
            shown.add_row(row["op"], row["case"], "FAILED", *[""] * 5, row["failed"])
            continue
        baselines = [
            f"{baseline['name']} {baseline['microseconds']:.1f}"
            if "failed" not in baseline
            else f"{baseline['name']} -"
            for baseline in row["baselines"]
        ]
        target = row["target_microseconds_h100"]
        shown.add_row(
            row["op"],
            row["case"],
            f"{row['microseconds']:.2f}",
            f"{row['floor_microseconds']:.2f}",
            f"{row['times_over_floor']:.1f}x",
            f"{row['share_of_copy_bandwidth']:.0%}",
            "" if target is None else f"{target:g}",
            f"{row['largest_error']:.1e}",
            ", ".join(baselines),
        )
    return shown


def record_name(gpu: str) -> str:
    """ops_h100_80gb_hbm3.json for "NVIDIA H100 80GB HBM3"."""
    return f"ops_{re.sub(r'[^a-z0-9]+', '_', gpu.lower().removeprefix('nvidia ')).strip('_')}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", help="only the cases whose op or name contains this word")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--check", action="store_true", help="check the answers at small sizes and measure nothing")
    parser.add_argument("--seconds", type=float, help="start no more baselines that compile after this time")
    parser.add_argument("--json", nargs="?", const=RESULTS, type=Path, metavar="FOLDER", help="write ops_<gpu>.json")
    arguments = parser.parse_args()
    cases = chosen(arguments.only)
    if arguments.check:
        return 1 if check(cases) else 0
    if "cuda" not in backends():
        what = "built with CUDA kernels" if torch.cuda.is_available() else "on a machine with a GPU"
        print(f"bench_ops: times need vispec {what}; --check checks the answers here", file=sys.stderr)
        return NO_DEVICE

    replays = 7 if arguments.quick else 25
    begin = {"gpu_state_before": gpu_state()}
    ceilings = measure_ceilings(replays)
    name = record_name(torch.cuda.get_device_name())

    def save(rows: list[dict]) -> None:
        if arguments.json is not None:
            write(arguments.json / name, "ops", rows, ceilings=asdict(ceilings), **begin)

    deadline = time.monotonic() + arguments.seconds if arguments.seconds else float("inf")
    bench = Bench(ceilings, replays, deadline, save)
    with torch.inference_mode():
        bench.run(cases)
    console.print(table(bench.rows, ceilings))
    return 1 if any("failed" in row for row in bench.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
