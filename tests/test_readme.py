"""The README and the page on training say what the committed records say."""

from __future__ import annotations

import json
import shutil

import pytest

from benchmarks import record, tables

CIRCUMSTANCES = {
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "cpu": "a processor",
    "cpu_threads": 2,
    "gpu": "NVIDIA H100",
    "gpu_state": {"driver_version": "580.1"},
    "torch": "2.13.0",
    "transformers": "5.23.0",
}
CEILINGS = {"copy_gigabytes_per_second": 3001.4, "matmul_teraflops": 790.2, "smallest_kernel_microseconds": 1.94}
ROW = {
    "op": "accept",
    "case": "greedy",
    "microseconds": 4.0,
    "floor_microseconds": 3.04,
    "times_over_floor": 1.316,
    "target_microseconds_h100": 6,
    "baselines": [
        {"name": "PyTorch", "microseconds": 50.0},
        {"name": "FlashInfer", "failed": "ModuleNotFoundError: No module named 'flashinfer'"},
    ],
}


@pytest.fixture
def results(tmp_path):
    """A folder of records like the committed one, without any of kernels."""
    folder = shutil.copytree(tables.RESULTS, tmp_path / "results")
    for path in folder.glob("ops_*.json"):
        path.unlink()
    return folder


def kernels_of(results) -> list[str]:
    text = tables.rendered(tables.README.read_text(), results)
    return text.split("<!-- kernels -->\n")[1].split("\n<!-- /kernels -->")[0].splitlines()


def test_the_tables_are_those_of_the_committed_records():
    text = tables.README.read_text()
    assert tables.rendered(text) == text, "run python -m benchmarks.tables"


def test_without_a_record_every_kernel_is_unmeasured(results):
    head, rule, *lines = kernels_of(results)
    assert lines == [f"| `{kernel}` | not yet measured |" for kernel in tables.KERNELS]
    assert {"accept", "build_tree", "commit", "grow_level"} <= set(tables.KERNELS)


def test_a_record_of_kernels_becomes_a_table(results):
    wrong = {"op": "accept", "case": "top-k", "failed": "WrongAnswer: the largest error is 1"}
    rows = [ROW, wrong, {**ROW, "op": "commit", "case": "4 tokens", "target_microseconds_h100": None}]
    whole = {"circumstances": CIRCUMSTANCES, "ceilings": CEILINGS, "rows": rows}
    (results / "ops_h100.json").write_text(json.dumps(whole))
    lines = kernels_of(results)
    others = "PyTorch: 50.0 µs (12.5x); FlashInfer: failed"
    assert f"| `accept` | greedy | 4.0 µs | 3.0 µs | 1.3x | 6 µs | {others} |" in lines
    assert f"| `commit` | 4 tokens | 4.0 µs | 3.0 µs | 1.3x |  | {others} |" in lines
    assert "| `accept` | top-k | failed | | | | |" in lines
    assert "| `grow_level` | not yet measured | | | | | |" in lines
    assert not any(line.startswith("| `accept` | not yet") for line in lines)
    assert any("3001 GB/s" in line and "790 TFLOP/s" in line and "1.9 µs" in line for line in lines)
    measured = "Measured on NVIDIA H100; driver 580.1, torch 2.13.0, transformers 5.23.0, commit 0123456789."
    assert lines[-1] == measured

    changed = {**CIRCUMSTANCES, "gpu": "NVIDIA H200", "uncommitted_changes": True}
    (results / "ops_h200.json").write_text(json.dumps({**whole, "circumstances": changed}))
    lines = kernels_of(results)
    assert measured in lines and lines[-1].endswith("commit 0123456789 with uncommitted changes.")
    assert sum(line.startswith("| kernel |") for line in lines) == 2


def test_a_missing_block_is_an_error(results):
    with pytest.raises(SystemExit, match="<!-- kernels -->"):
        tables.rendered(tables.README.read_text().replace("<!-- kernels -->", ""), results)


def test_a_record_says_where_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_source", lambda: (None, None))
    monkeypatch.setenv("VISPEC_COMMIT", "abc")
    record.write(tmp_path / "new" / "one.json", "ops", [{"x": 1}], ceilings={"y": 2})
    found = json.loads((tmp_path / "new" / "one.json").read_text())
    assert (found["benchmark"], found["rows"], found["ceilings"]) == ("ops", [{"x": 1}], {"y": 2})
    # Without git nobody knows whether the files are those of the commit.
    assert found["circumstances"]["commit"] == "abc" and found["circumstances"]["uncommitted_changes"] is None


def test_the_gpus_state_is_read_from_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 1980 MHz, 2619 MHz, 35, 70.10 W'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record.torch.cuda, "current_device", lambda: 0)
    state = record.gpu_state()
    assert state["driver_version"] == "580.1" and state["clocks.sm"] == "1980 MHz" and state["power.draw"] == "70.10 W"
    program.write_text("#!/bin/sh\necho 'no devices were found'\n")
    assert record.gpu_state() is None
