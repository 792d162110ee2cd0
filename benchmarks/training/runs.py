"""What training runs that are compared cost and gained.

Each folder holds `figures.json` of `vispec train eval`, and what `vispec train fit` left there (nothing for a draft
without weights). A name given several times is one draft trained with several seeds: the table then shows the mean and
the standard deviation. All runs of a comparison are named at once.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

RECORD = RESULTS / "training_runs.json"
# The rows of the table, whether they have been run or not; the first is what the others are compared with.
RUNS = (
    "ViSpec",
    "no global feature",
    "5 queries",
    "17 queries",
    "65 queries",
    "no self-rollout",
    "no first stage",
    "short answers",
    "EAGLE-2",
    "EAGLE-2 for as long",
    "text-only EAGLE",
    "Medusa",
    "prompt lookup",
    "oracle",
)
# What must be the same in all runs of a comparison.
ALIKE = ("tree", "max_new_tokens", "extension", "max_repeated", "shortest_answer", "seed", "prompts")
TEMPERATURES = ("0", "1")


def read_run(name: str, folder: Path) -> dict[str, Any]:
    """One run's cost and figures. Raises: FileNotFoundError without figures; ValueError for an unknown name."""
    if name not in RUNS:
        raise ValueError(f"training runs: a run must be one of {', '.join(RUNS)}, got {name}")
    figures = json.loads((folder / "figures.json").read_text())
    row = {"name": name, "answer_tokens_seen": 0, "minutes": 0.0, **{key: figures[key] for key in ALIKE}}
    row["temperatures"] = {
        key: {name: found[name] for name in ("tau", "rounds", "new_tokens", "acceptance_by_depth")}
        for key, found in figures["temperatures"].items()
    }
    if (folder / "log.csv").is_file():
        config = json.loads((folder / "training.json").read_text())["config"]
        steps = read_log(folder)
        row["answer_tokens_seen"], row["minutes"] = so_far(steps)[-1]
        # What the target took depends on which run read it first: its features are kept for the others.
        row["own_seconds_a_step"] = statistics.median(
            float(step["seconds"]) * (1 - float(step["target_share"])) for step in steps
        )
        row["config"] = config
    return row


def read_log(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's `log.csv`. Raises: FileNotFoundError."""
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def so_far(steps: list[dict[str, str]]) -> list[tuple[int, float]]:
    """Answer tokens seen and minutes up to each row of a log.

    Only every so many steps are in the log, and the last one: each stands for those since the one before.
    """
    seen, minutes, last, found = 0.0, 0.0, 0, []
    for row in steps:
        count, last = int(row["step"]) - last, int(row["step"])
        seen += count * float(row["rows"])
        minutes += count * float(row["seconds"]) / 60
        found.append((round(seen), minutes))
    return found


def shown(record: dict[str, Any]) -> list[str]:
    """The table's lines. Raises: ValueError for runs that were measured on different prompts or trees."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in record["rows"]:
        runs[row["name"]].append(row)
    measured_alike([row for rows in runs.values() for row in rows])
    lines = [
        "| draft | seeds | answer tokens seen | minutes | a step without the target | tau, T = 0 | against ViSpec "
        "| tau, T = 1 | against ViSpec |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    own = {name: [row["own_seconds_a_step"] for row in rows if "config" in row] for name, rows in runs.items()}
    first_own = own.get(RUNS[0])
    for name in RUNS:
        rows = runs[name]
        if not rows:
            lines.append(f"| {name} | not yet measured | | | | | | | |")
            continue
        cells = [
            str(len(rows)),
            f"{statistics.mean(row['answer_tokens_seen'] for row in rows):,.0f}",
            f"{statistics.mean(row['minutes'] for row in rows):.0f}",
            f"{statistics.mean(own[name]) / statistics.mean(first_own):.1f}x" if own[name] and first_own else "",
        ]
        for temperature in TEMPERATURES:
            taus, first = _taus(rows, temperature), _taus(runs[RUNS[0]], temperature)
            cells.append(_mean_and_spread(taus))
            known = taus and first
            cells.append(f"{statistics.mean(taus) / statistics.mean(first):.2f}x" if known else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def measured_alike(rows: list[dict[str, Any]]) -> None:
    """Raises ValueError for figures of different prompts or trees."""
    alike = {json.dumps([row[key] for key in ALIKE]) for row in rows}
    if len(alike) > 1:
        raise ValueError(f"training runs: runs must be measured alike, got {sorted(alike)}")


def _taus(rows: list[dict[str, Any]], temperature: str) -> list[float]:
    return [row["temperatures"][temperature]["tau"] for row in rows if temperature in row["temperatures"]]


def _mean_and_spread(values: list[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
