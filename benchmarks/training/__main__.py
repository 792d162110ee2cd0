"""Command line: see the package's docstring."""

from __future__ import annotations

import argparse
from pathlib import Path

import benchmarks.training
from benchmarks.record import write
from benchmarks.training import costs, curve, runs


def main(argv: list[str] | None = None) -> None:
    about, kept = benchmarks.training.__doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=about, formatter_class=kept)
    commands = parser.add_subparsers(dest="command", required=True)
    compared = commands.add_parser("runs", description=runs.__doc__, formatter_class=kept)
    compared.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    one = commands.add_parser("curve", description=curve.__doc__, formatter_class=kept)
    one.add_argument("folder", type=Path)
    one.add_argument("--picture", type=Path, help="SVG or PNG (needs matplotlib)")
    costs.declare(commands.add_parser("costs", description=costs.__doc__, formatter_class=kept))
    arguments = parser.parse_args(argv)
    if arguments.command == "runs":
        pairs = [run.partition("=") for run in arguments.runs]
        rows = [runs.read_run(name, Path(folder)) for name, _, folder in pairs]
        runs.shown({"rows": rows})
        write(runs.RECORD, "training_runs", rows)
        return
    if arguments.command == "costs":
        write(costs.RECORD, "training_costs", [costs.measure(arguments)])
        return
    rows = curve.read_curve(arguments.folder)
    write(curve.RECORD, "training_curve", rows)
    if arguments.picture is not None:
        curve.draw(arguments.picture, rows)


if __name__ == "__main__":
    main()
