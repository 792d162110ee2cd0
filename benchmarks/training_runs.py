"""Records what training runs cost and gained, and writes the table of docs/training.md from the record.

python -m benchmarks.training_runs record ViSpec=draft/ "no global feature"=ablation/ "prompt lookup"=lookup/
python -m benchmarks.training_runs table          # rewrite the marked block of docs/training.md
python -m benchmarks.training_runs table --check  # fail where it differs from the record

Each folder holds `figures.json` of `vispec train eval`, and what `vispec train fit` left there (nothing for a draft
without weights). A second record replaces the first, so all runs of a comparison are named at once.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
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
ALIKE = ("tree", "max_new_tokens", "extension", "seed", "prompts")
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
    rows = {} if record is None else {row["name"]: row for row in record["rows"]}
    alike = {json.dumps([row[key] for key in ALIKE]) for row in rows.values()}
    if len(alike) > 1:
        raise ValueError(f"training_runs: runs must be measured alike, got {sorted(alike)}")
    lines = [
        "| draft | answer tokens seen | minutes | tau, T = 0 | against ViSpec | tau, T = 1 | against ViSpec |",
        "|---|---|---|---|---|---|---|",
    ]
    first = rows.get(RUNS[0])
    for name in RUNS:
        row = rows.get(name)
        if row is None:
            lines.append(f"| {name} | not yet measured | | | | | |")
            continue
        cells = [f"{row['answer_tokens_seen']:,}", f"{row['minutes']:.0f}"]
        for temperature in TEMPERATURES:
            found = row["temperatures"].get(temperature)
            other = None if first is None else first["temperatures"].get(temperature)
            cells.append("" if found is None else f"{found['tau']:.2f}")
            known = found is not None and other is not None
            cells.append(f"{found['tau'] - other['tau']:+.2f}" if known else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


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
