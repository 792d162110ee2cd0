"""The picture of floors and measured times: arithmetic intensity and bytes against time.

python -m benchmarks.engine.roofline docs/roofline.svg                      # floors alone, of an H100's data sheet
python -m benchmarks.engine.roofline figures.svg --record engine.json       # with what bench_engine has measured

An SVG holds the numbers that it was drawn from, which the tests compare with what the code computes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine.floors import (
    H100_DATA_SHEET,
    NODES,
    PHASES,
    Setting,
    Work,
    adaptor_pass,
    round_phases,
    target_pass,
)
from benchmarks.engine.page import CONTEXT, DRAFT_CONTEXT, is_typical
from benchmarks.engine.targets import SHAPES
from benchmarks.pictures import check_plotting, picture

LEVELS = PHASES[0]
MARKERS = {"plain step": "s", LEVELS: "^", "adaptor": "D"}
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def points() -> dict[str, dict[str, dict[str, float]]]:
    """For each target and pass: gigabytes, operations a byte, and the floor in milliseconds.

    A pass over n nodes is called "verify n"; one over a single node is a plain step.
    """
    setting = Setting(CONTEXT, DRAFT_CONTEXT)
    found = {}
    for name, shape in SHAPES.items():
        passes = {f"verify {nodes}": target_pass(shape, setting, nodes) for nodes in NODES}
        passes["plain step"] = passes["verify 1"]
        passes[LEVELS] = round_phases(shape, setting)[LEVELS]
        passes["adaptor"] = adaptor_pass(shape, shape.picture_rows)
        found[name] = {kind: point(parts) for kind, parts in passes.items()}
    return found


def point(parts: Sequence[Work]) -> dict[str, float]:
    """One pass, to four digits."""
    moved = sum(part.bytes_moved for part in parts)
    values = {
        "gigabytes": moved / 1e9,
        "operations_a_byte": sum(part.operations for part in parts) / moved,
        "floor_ms": H100_DATA_SHEET.seconds(parts) * 1e3,
    }
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def measured(row: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of the passes of `points` that a row of a record holds."""
    if "phases" not in row:
        return {}
    found = {f"verify {each['nodes']}": each["ms"] for each in row["verify"]}
    found |= {"plain step": row["plain_step"]["ms"], LEVELS: row["phases"][LEVELS]["ms"]}
    return found | {"adaptor": row["adaptor"]["ms"]}


def draw(path: Path, rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Draws floors as hollow marks, and filled ones where rows of a record at the same context have a time.

    Raises: SystemExit without matplotlib.
    """
    check_plotting("bench_engine: --plot")
    floors = points()
    times = {row["target"]: measured(row) for row in rows if is_typical(row)}
    with picture(path, "roofline", (10, 4.2), floors) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for (name, passes), colour in zip(floors.items(), COLOURS, strict=True):
            for each, across in zip(axes, ("operations_a_byte", "gigabytes"), strict=True):
                _passes(each, passes, times.get(name, {}), across, colour)
        _describe(*axes)
        axes[1].legend(*_legend(list(floors)), fontsize=8)


def _passes(axes: Any, passes: Mapping, times: Mapping[str, float], across: str, colour: str) -> None:
    """One target's passes in one panel."""
    verify = [passes[f"verify {nodes}"] for nodes in NODES]
    line = [each[across] for each in verify], [each["floor_ms"] for each in verify]
    axes.plot(*line, color=colour, marker="o", markersize=3, linewidth=1, markerfacecolor="white")
    for kind, marker in MARKERS.items():
        axes.plot(passes[kind][across], passes[kind]["floor_ms"], marker, color=colour, markerfacecolor="white")
    for kind, milliseconds in times.items():
        axes.plot(passes[kind][across], milliseconds, MARKERS.get(kind, "o"), color=colour, markersize=5)


def _describe(intensity: Any, moved: Any) -> None:
    machine = H100_DATA_SHEET
    ridge = machine.operations_per_second / machine.bytes_per_second
    intensity.axvline(ridge, color="#999999", linewidth=0.8, linestyle="--")
    intensity.text(ridge * 0.95, 0.012, f"{ridge:.0f} operations a byte", rotation=90, ha="right", color="#666666")
    ends = [0.015, 40]
    line = [each * 1e12 / machine.bytes_per_second for each in ends]
    moved.plot(ends, line, color="#999999", linewidth=0.8, linestyle="--")
    moved.text(0.4, 0.07, f"{machine.bytes_per_second / 1e12:.2f} TB/s", color="#666666")
    for axes in (intensity, moved):
        axes.set(xscale="log", yscale="log")
    intensity.set(xlabel="operations a byte", ylabel="milliseconds")
    moved.set(xlabel="gigabytes")
    intensity.set_title(f"floors on an H100 (data sheet), context {CONTEXT}, batch 1", loc="left")
    moved.set_title("hollow: floor; filled: measured", loc="left")


def _legend(names: Sequence[str]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    marks = {f"verify, 1 to {NODES[-1]} nodes": "o", **MARKERS}
    lines = [Line2D([], [], color=colour) for _, colour in zip(names, COLOURS, strict=True)]
    look = {"color": "#444444", "linestyle": "", "markerfacecolor": "white"}
    kinds = [Line2D([], [], marker=mark, **look) for mark in marks.values()]
    return lines + kinds, [*names, *marks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="SVG or PNG")
    parser.add_argument("--record", type=Path, help="what bench_engine --json wrote")
    arguments = parser.parse_args()
    draw(arguments.picture, json.loads(arguments.record.read_text())["rows"] if arguments.record else ())


if __name__ == "__main__":
    main()
