"""How loss and tau went in one training run: what a reader may expect of one that goes well.

The folder is what `vispec train fit` left there. Tau is known at the checkpoints (`checkpoints/step-*`) that hold a
`figures.json` of `vispec train eval`, all measured alike; `keep_checkpoints` says how many there are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pictures import check_plotting, picture
from benchmarks.record import RESULTS
from benchmarks.training.runs import TEMPERATURES, measured_alike, read_log, so_far
from vispec.train.config import read_config

RECORD = RESULTS / "training_curve.json"
# Logged steps that one point of the loss is the mean of.
SMOOTHED = 8


def read_curve(folder: Path) -> dict[str, Any]:
    """Loss by step, tau by checkpoint, and the config.

    Raises: FileNotFoundError without a log or without a measured checkpoint; ValueError where those were measured
    differently.
    """
    logged = read_log(folder)
    config = read_config(folder / "training.json", {})
    last, losses = int(logged[-1]["step"]), []
    for row, (seen, minutes) in zip(logged, so_far(logged), strict=True):
        step = int(row["step"])
        passes = config.passes_of(step, last)
        losses.append(
            {
                "step": step,
                "passes": passes,
                "answer_tokens_seen": seen,
                "minutes": minutes,
                "loss_a_pass": float(row["loss"]) / passes,
            }
        )
    figures = {
        int(path.parent.name.removeprefix("step-")): json.loads(path.read_text())
        for path in sorted(folder.glob("checkpoints/step-*/figures.json"))
    }
    if not figures:
        raise FileNotFoundError(f"training curve: {folder} must hold checkpoints/step-*/figures.json, got none")
    measured_alike(list(figures.values()))
    taus = [
        {"step": step, **{f"tau_{key}": each["temperatures"][key]["tau"] for key in TEMPERATURES}}
        for step, each in figures.items()
    ]
    return {"config": config.as_dict(), "losses": losses, "taus": taus}


def shown(record: dict[str, Any]) -> list[str]:
    """The table's lines: one for each measured checkpoint."""
    lines = [
        "| step | passes | answer tokens seen | minutes | loss a pass | tau, T = 0 | tau, T = 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    losses = record["rows"]["losses"]
    for tau in record["rows"]["taus"]:
        place = next(place for place, each in enumerate(losses) if each["step"] >= tau["step"])
        at = losses[place]
        lines.append(
            f"| {tau['step']} | {at['passes']} | {at['answer_tokens_seen']:,} | {at['minutes']:.0f} "
            f"| {smoothed(losses, place):.2f} | {tau['tau_0']:.2f} | {tau['tau_1']:.2f} |"
        )
    return lines


def smoothed(losses: list[dict[str, Any]], place: int) -> float:
    """Mean loss a pass of the last logged steps up to `place` that had as many passes."""
    alike = [each for each in losses[: place + 1] if each["passes"] == losses[place]["passes"]][-SMOOTHED:]
    return sum(each["loss_a_pass"] for each in alike) / len(alike)


def points(rows: dict[str, Any]) -> dict[str, list[list[float]]]:
    """What the picture shows, to four digits: for each line its [answer tokens seen, value] pairs."""
    losses = rows["losses"]
    seen = {each["step"]: each["answer_tokens_seen"] for each in losses}
    found = {"loss a pass": [[each["answer_tokens_seen"], smoothed(losses, i)] for i, each in enumerate(losses)]}
    for key in TEMPERATURES:
        found[f"tau, T = {key}"] = [[seen[each["step"]], each[f"tau_{key}"]] for each in rows["taus"]]
    return {name: [[across, float(f"{value:.4g}")] for across, value in each] for name, each in found.items()}


def draw(path: Path, rows: dict[str, Any]) -> None:
    """Draws loss and tau against the tokens seen. Raises: SystemExit without matplotlib."""
    check_plotting("training curve: --picture")
    lines = points(rows)
    with picture(path, "training curve", (10, 3.4), lines) as figure:
        left, right = figure.subplots(1, 2)
        for name, pairs in lines.items():
            axes, marker = (left, None) if name == "loss a pass" else (right, "o")
            axes.plot([across / 1e6 for across, _ in pairs], [value for _, value in pairs], marker=marker, label=name)
        rises = [
            (each["answer_tokens_seen"], each["passes"])
            for before, each in zip(rows["losses"], rows["losses"][1:], strict=False)
            if each["passes"] != before["passes"]
        ]
        for seen, passes in rises:
            left.axvline(seen / 1e6, color="#999999", linewidth=0.8, linestyle="--")
            left.text(seen / 1e6, left.get_ylim()[1], f" {passes} passes", va="top", color="#666666")
        left.set(title="loss a pass", xlabel="million answer tokens seen")
        right.set(title="held-out tau", xlabel="million answer tokens seen", ylim=(0, None))
        right.legend()
