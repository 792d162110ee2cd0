"""Records what training runs cost and gained, and writes the table of docs/training.md from the record.

python -m benchmarks.training_runs record ViSpec=draft/ "no global feature"=ablation/ "prompt lookup"=lookup/
python -m benchmarks.training_runs table          # rewrite the marked block of docs/training.md
python -m benchmarks.training_runs table --check  # fail where it differs from the record

Each folder holds `figures.json` of `vispec train eval`, and what `vispec train fit` left there (nothing for a draft
without weights). A name given several times is one draft trained with several seeds: the table then shows the mean and
the standard deviation. A second record replaces the first, so all runs of a comparison are named at once.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.record import write
from benchmarks.tables import RESULTS, ROOT, source

RECORD = RESULTS / "training_runs.json"
PAGE = ROOT / "docs" / "training.md"
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
    "text-only EAGLE",
    "Medusa",
    "prompt lookup",
)
# What must be the same in all runs of a comparison.
ALIKE = ("tree", "max_new_tokens", "extension", "max_repeated", "shortest_answer", "seed", "prompts")
TEMPERATURES = ("0", "1")


def read_run(name: str, folder: Path) -> dict[str, Any]:
    """One run's cost and figures. Raises: FileNotFoundError without figures; ValueError for an unknown name."""
    if name not in RUNS:
        raise ValueError(f"training_runs: a run must be one of {', '.join(RUNS)}, got {name}")
    figures = json.loads((folder / "figures.json").read_text())
    row = {"name": name, "answer_tokens_seen": 0, "minutes": 0.0, **{key: figures[key] for key in ALIKE}}
    row["temperatures"] = {
        key: {name: found[name] for name in ("tau", "rounds", "new_tokens", "acceptance_by_depth")}
        for key, found in figures["temperatures"].items()
    }
    log = folder / "log.csv"
    if log.is_file():
        config = json.loads((folder / "training.json").read_text())["config"]
        with open(log, newline="") as file:
            steps = list(csv.DictReader(file))
        # Only every so many steps are in the log, and the last one.
        row["answer_tokens_seen"] = round(_mean(steps, "rows") * int(steps[-1]["step"]))
        row["minutes"] = _mean(steps, "seconds") * int(steps[-1]["step"]) / 60
        row["config"] = config
    return row


def _mean(steps: list[dict[str, str]], name: str) -> float:
    return sum(float(step[name]) for step in steps) / len(steps)


def shown(record: dict[str, Any] | None) -> list[str]:
    """The table's lines. Raises: ValueError for runs that were measured on different prompts or trees."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in [] if record is None else record["rows"]:
        runs[row["name"]].append(row)
    alike = {json.dumps([row[key] for key in ALIKE]) for rows in runs.values() for row in rows}
    if len(alike) > 1:
        raise ValueError(f"training_runs: runs must be measured alike, got {sorted(alike)}")
    lines = [
        "| draft | seeds | answer tokens seen | minutes | tau, T = 0 | against ViSpec | tau, T = 1 | against ViSpec |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in RUNS:
        rows = runs[name]
        if not rows:
            lines.append(f"| {name} | not yet measured | | | | | | |")
            continue
        cells = [
            str(len(rows)),
            f"{statistics.mean(row['answer_tokens_seen'] for row in rows):,.0f}",
            f"{statistics.mean(row['minutes'] for row in rows):.0f}",
        ]
        for temperature in TEMPERATURES:
            taus, first = _taus(rows, temperature), _taus(runs[RUNS[0]], temperature)
            cells.append(_mean_and_spread(taus))
            known = taus and first
            cells.append(f"{statistics.mean(taus) / statistics.mean(first):.2f}x" if known else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _taus(rows: list[dict[str, Any]], temperature: str) -> list[float]:
    return [row["temperatures"][temperature]["tau"] for row in rows if temperature in row["temperatures"]]


def _mean_and_spread(values: list[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def rendered(text: str, record: dict[str, Any] | None) -> str:
    """The page with its marked block written anew."""
    body = "\n".join([*shown(record), *([] if record is None else ["", source(record)])])
    pattern = re.compile(r"(<!-- runs -->\n).*?(\n<!-- /runs -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError("training_runs: docs/training.md must hold the block <!-- runs --> ... <!-- /runs -->")
    return pattern.sub(lambda match: match[1] + body + match[2], text)


def present() -> dict[str, Any] | None:
    """The committed record, None where there is none."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    commands.add_parser("table").add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.command == "record":
        pairs = [run.partition("=") for run in arguments.runs]
        rows = [read_run(name, Path(folder)) for name, _, folder in pairs]
        shown({"rows": rows})
        write(RECORD, "training_runs", rows)
        return
    text = PAGE.read_text()
    wanted = rendered(text, present())
    if arguments.check and text != wanted:
        raise SystemExit("training_runs: docs/training.md differs from the record; run the command without --check")
    if not arguments.check:
        PAGE.write_text(wanted)


if __name__ == "__main__":
    main()
