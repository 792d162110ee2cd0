"""The table of docs/training.md is what the committed record of training runs says."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks import training_runs


def test_the_table_of_training_runs_is_that_of_the_committed_record():
    text = training_runs.PAGE.read_text()
    assert training_runs.rendered(text, training_runs.present()) == text, "run python -m benchmarks.training_runs table"


def make_run(folder, tau: float, steps: list[dict] | None, **more):
    folder.mkdir()
    group = {"tau": tau, "rounds": 10, "new_tokens": 40, "acceptance_by_depth": [0.5]}
    shared = {"tree": {"depth": 3}, "max_new_tokens": 64, "extension": "", "seed": 0, "prompts": 5}
    shared |= {"max_repeated": 0.3, "shortest_answer": 1}
    figures = {**shared, "temperatures": {"0": group, "1": {**group, "tau": tau / 2}}, **more}
    (folder / "figures.json").write_text(json.dumps(figures))
    if steps:
        (folder / "training.json").write_text(json.dumps({"config": {"out": "x"}}))
        with open(folder / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(steps[0]))
            writer.writeheader()
            writer.writerows(steps)


def test_runs_become_rows(tmp_path, monkeypatch):
    logged = [{"step": step, "rows": rows, "seconds": 30} for step, rows in ((10, 1000), (20, 2000))]
    make_run(tmp_path / "whole", 2.0, logged)
    make_run(tmp_path / "again", 1.0, [{"step": 20, "rows": 500, "seconds": 60}])
    make_run(tmp_path / "lookup", 0.5, None)
    make_run(tmp_path / "other", 1.0, logged, max_new_tokens=32)
    record, page = tmp_path / "record.json", tmp_path / "page.md"
    monkeypatch.setattr(training_runs, "RECORD", record)
    monkeypatch.setattr(training_runs, "PAGE", page)
    page.write_text("before\n<!-- runs -->\nold\n<!-- /runs -->\nbehind\n")
    runs = [f"ViSpec={tmp_path / 'whole'}", f"ViSpec={tmp_path / 'again'}", f"prompt lookup={tmp_path / 'lookup'}"]
    training_runs.main(["record", *runs])
    training_runs.main(["table"])
    lines = page.read_text().splitlines()
    # 20 steps of 1500 rows and half a minute each, and as many of 500 rows and a minute: 1.5 +- sqrt(0.5).
    assert "| ViSpec | 2 | 20,000 | 15 | 1.50 ± 0.71 | 1.00x | 0.75 ± 0.35 | 1.00x |" in lines
    assert "| prompt lookup | 1 | 0 | 0 | 0.50 | 0.33x | 0.25 | 0.33x |" in lines
    assert "| Medusa | not yet measured | | | | | | |" in lines and lines[0] == "before" and lines[-1] == "behind"
    assert "old" not in lines and any(line.startswith("Measured on ") for line in lines)
    training_runs.main(["table", "--check"])
    page.write_text(page.read_text().replace("1.50", "2.50"))
    with pytest.raises(SystemExit, match="differs from the record"):
        training_runs.main(["table", "--check"])
    with pytest.raises(ValueError, match="runs must be measured alike"):
        training_runs.main(["record", *runs, f"EAGLE-2={tmp_path / 'other'}"])
    with pytest.raises(ValueError, match="a run must be one of ViSpec, .*, got Hydra"):
        training_runs.main(["record", f"Hydra={tmp_path / 'whole'}"])
