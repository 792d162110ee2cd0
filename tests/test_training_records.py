"""What docs/training.md says of training runs is what the committed records say."""

from __future__ import annotations

import csv
import json
import shutil
from xml.etree import ElementTree

import pytest

from benchmarks import tables
from benchmarks.training import costs, curve, runs
from benchmarks.training.__main__ import main


def test_the_tables_are_those_of_the_committed_records():
    text = tables.TRAINING.read_text()
    assert tables.rendered(text, page=tables.TRAINING) == text, "run python -m benchmarks.tables"


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
    logged = [
        {"step": step, "rows": rows, "seconds": 30, "target_share": 0.5} for step, rows in ((10, 1000), (20, 2000))
    ]
    make_run(tmp_path / "whole", 2.0, logged)
    make_run(tmp_path / "again", 1.0, [{"step": 20, "rows": 500, "seconds": 60, "target_share": 0}])
    make_run(tmp_path / "lookup", 0.5, None)
    make_run(tmp_path / "slow", 1.2, [{"step": 20, "rows": 1000, "seconds": 600, "target_share": 0.875}])
    make_run(tmp_path / "other", 1.0, logged, max_new_tokens=32)
    monkeypatch.setattr(runs, "RECORD", tmp_path / runs.RECORD.name)
    compared = [f"ViSpec={tmp_path / 'whole'}", f"ViSpec={tmp_path / 'again'}", f"prompt lookup={tmp_path / 'lookup'}"]
    main(["runs", *compared, f"EAGLE-2={tmp_path / 'slow'}"])
    page = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in tables.TRAINING_BLOCKS)
    lines = tables.rendered(f"before\n{page}behind\n", tmp_path, tables.TRAINING).splitlines()
    # 20 steps of 1500 rows and half a minute each, and as many of 500 rows and a minute: 1.5 +- sqrt(0.5).
    assert "| ViSpec | 2 | 20,000 | 15 | 1.0x | 1.50 ± 0.71 | 1.00x | 0.75 ± 0.35 | 1.00x |" in lines
    assert "| prompt lookup | 1 | 0 | 0 |  | 0.50 | 0.33x | 0.25 | 0.33x |" in lines
    # Half of half a minute and a whole one, against an eighth of ten.
    assert "| EAGLE-2 | 1 | 20,000 | 200 | 2.0x | 1.20 | 0.80x | 0.60 | 0.80x |" in lines
    assert "| Medusa | not yet measured | | | | | | | |" in lines and lines[0] == "before" and lines[-1] == "behind"
    assert "old" not in lines and any(line.startswith("Measured on ") for line in lines)
    with pytest.raises(ValueError, match="runs must be measured alike"):
        main(["runs", *compared, f"EAGLE-2={tmp_path / 'other'}"])
    with pytest.raises(ValueError, match="a run must be one of ViSpec, .*, got Hydra"):
        main(["runs", f"Hydra={tmp_path / 'whole'}"])


def make_curve(folder):
    """A run of 20 steps, logged every five, whose second half has two passes; steps 10 and 20 were measured."""
    logged = [
        {"step": step, "rows": 100, "seconds": 30, "loss": loss} for step, loss in ((5, 8), (10, 6), (15, 10), (20, 8))
    ]
    make_run(folder, 9.0, logged)
    config = {"data": ["x"], "out": "x", "mtp_steps": 1, "mtp_warmup": 0.5}
    (folder / "training.json").write_text(json.dumps({"config": config}))
    (folder / "checkpoints").mkdir()
    for step, tau in ((10, 1.0), (20, 2.5)):
        make_run(folder / "checkpoints" / f"step-{step:08d}", tau, None)


def test_a_run_becomes_a_curve(tmp_path, monkeypatch):
    make_curve(tmp_path / "run")
    monkeypatch.setattr(curve, "RECORD", tmp_path / curve.RECORD.name)
    main(["curve", str(tmp_path / "run")])
    shown = curve.shown(json.loads(curve.RECORD.read_text()))
    # Five steps of 100 tokens and half a minute each for every line of the log; the first pass alone lost 8, then 6.
    assert shown[2:] == ["| 10 | 1 | 1,000 | 5 | 7.00 | 1.00 | 0.50 |", "| 20 | 2 | 2,000 | 10 | 4.50 | 2.50 | 1.25 |"]


def test_a_curve_needs_measured_checkpoints_that_were_measured_alike(tmp_path):
    make_curve(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    figures = checkpoints / "step-00000010" / "figures.json"
    other = json.loads(figures.read_text())
    figures.write_text(json.dumps({**other, "prompts": other["prompts"] + 1}))
    with pytest.raises(ValueError, match="runs must be measured alike"):
        curve.read_curve(tmp_path / "run")
    shutil.rmtree(checkpoints)
    with pytest.raises(FileNotFoundError, match=r"run must hold checkpoints/step-\*/figures.json, got none"):
        curve.read_curve(tmp_path / "run")


def test_the_picture_of_the_curve_holds_the_committed_figures():
    rows = json.loads(curve.RECORD.read_text())["rows"]
    picture = ElementTree.parse(tables.ROOT / "docs" / "training_curve.svg").getroot()
    held = picture.find(".//{http://purl.org/dc/elements/1.1/}description").text
    assert json.loads(held) == curve.points(rows), "run python -m benchmarks.training curve again"


def test_costs_are_shown():
    row = {"model": "demo", "dtype": "bfloat16", "requests": 16, "batch_size": 8, "max_new_tokens": 64, "repeats": 3}
    row |= {"collect_over_generate": 1.234, "target_share_of_a_step": 0.65, "fit_over_plain_memory": 1.4}
    text = "\n".join(costs.shown({"rows": [row]}))
    assert all(figure in text for figure in ("| 1.23x |", "| 65% |", "| 1.40x |", "demo, bfloat16, 16 prompts"))


def test_a_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    make_curve(tmp_path / "run")
    curve.draw(tmp_path / "curve.svg", curve.read_curve(tmp_path / "run"))
    assert "held-out tau" in (tmp_path / "curve.svg").read_text()
