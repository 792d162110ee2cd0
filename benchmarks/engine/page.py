"""The tables of docs/engine.md: floors of a round, and what bench_engine measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.engine.floors import (
    H100_DATA_SHEET,
    H100_IN_PRACTICE,
    PHASES,
    Machine,
    Setting,
    round_phases,
    target_pass,
)
from benchmarks.engine.targets import SHAPES

CONTEXT = 2048
# A picture of that context is one row of the draft's cache; text is left.
DRAFT_CONTEXT = 256
UNMEASURED = "not yet measured"
DOES_NOT_FIT = "more memory than there is"


def floors() -> str:
    """Each phase of a round of each target, its sum, and a plain step; last what copies reach in practice."""
    head = ["target", *PHASES, "round", "plain step"]
    practice = f"at {H100_IN_PRACTICE.bytes_per_second / 1e12:.2f} TB/s"
    lines = [*header([*head, f"round {practice}", f"plain step {practice}", f"round {practice}, draft in int8"])]
    for name in SHAPES:
        found = [*floors_of(name, H100_DATA_SHEET).values(), *list(floors_of(name, H100_IN_PRACTICE).values())[-2:]]
        found.append(floors_of(name, H100_IN_PRACTICE, draft_weight_bytes=1)["round"])
        lines.append(line([name, *(duration(value) for value in found)]))
    return "\n".join(lines)


def floors_of(name: str, machine: Machine, draft_weight_bytes: int = 2) -> dict[str, float]:
    """Least seconds of each phase, of "round" and of "plain step" of one target."""
    shape, setting = SHAPES[name], Setting(CONTEXT, DRAFT_CONTEXT, draft_weight_bytes=draft_weight_bytes)
    found = {phase: machine.seconds(parts) for phase, parts in round_phases(shape, setting).items()}
    found["round"] = sum(found.values())
    found["plain step"] = machine.seconds(target_pass(shape, setting, 1))
    return found


def duration(seconds: float) -> str:
    """Milliseconds, or microseconds where those say more."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-5 else f"{seconds * 1e6:.2f} µs"


def header(cells: list[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(cells), "|" + "---|" * len(cells)]


def line(cells: list[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


PHASE_HEAD = ["target", *PHASES, "rest", "round, call by call", "round, captured", "host"]


def only(what: str) -> list[str]:
    """The cells behind a target of which there is but this to say."""
    return [what, *[""] * (len(PHASE_HEAD) - 2)]


def unmeasured_phases() -> str:
    """The head of `phases`, and that there is no figure."""
    return "\n".join([*header(PHASE_HEAD), *(line([name, *only(UNMEASURED)]) for name in SHAPES)])


def phases(record: Mapping[str, Any]) -> list[str]:
    """Each phase of one row of prompts at the floors' context, with times over the floor."""
    rows = {row["target"]: row for row in record["rows"] if is_typical(row)}
    lines = header(PHASE_HEAD)
    for name in SHAPES:
        lines.append(line([name, *(phase_cells(rows[name]) if name in rows else only(UNMEASURED))]))
    return lines


def is_typical(row: Mapping[str, Any]) -> bool:
    """Whether a row of a record is of the floors' setting."""
    return row["context"] == CONTEXT and row["batch"] == 1 and not (row["quantised"] or row["draft_weights"])


def phase_cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of `PHASE_HEAD` behind the target's name."""
    if "phases" not in row:
        return only(DOES_NOT_FIT)
    rest = row["phases_rest_ms"] + row["phases_pacing_ms"]
    host = row["host_ms_a_round"]
    return [
        *(timed(row["phases"][name]) for name in PHASES),
        duration(rest / 1e3),
        duration(row["phases_round_ms"] / 1e3),
        "not captured" if row["replayed_round"] is None else timed(row["replayed_round"]),
        "" if host is None else duration(host / 1e3),
    ]


def timed(figures: Mapping[str, float]) -> str:
    """A time and how often its floor goes into it."""
    return f"{duration(figures['ms'] / 1e3)} ({figures['times_over_floor']:.1f}x)"


def rounds(record: Mapping[str, Any]) -> list[str]:
    """Every case: round and plain step, tokens a second, and against the other ways."""
    head = ["target", "layers' weights", "context", "batch", "round", "plain step", "tokens/s"]
    head += ["over own plain", "over `generate`", "over compiled `generate`"]
    lines = header(head)
    for row in record["rows"]:
        weights = row["quantised"] or row["dtype"]
        if row["draft_weights"]:
            weights += f", draft's {row['draft_weights']}"
        about = [row["target"], weights, f"{row['context'] or ''}", f"{row['batch'] or ''}"]
        lines.append(line([*about, *round_cells(row)]))
    ceilings = record["ceilings"]
    return [
        *lines,
        "",
        f"Floors: bytes at {ceilings['copy_gigabytes_per_second']:.0f} GB/s, matrix operations at "
        f"{ceilings['matmul_teraflops']:.0f} TFLOP/s, both measured in the same run.",
    ]


def round_cells(row: Mapping[str, Any]) -> list[str]:
    """Times and speed-ups of one case."""
    if "round" not in row:
        return [DOES_NOT_FIT, *[""] * 5]
    speed_ups = (row[f"speed_up_over_{way}"] for way in ("own_plain", "generate_eager", "generate_compiled"))
    cells = [timed(row["round"]), timed(row["plain_step"]), f"{row['tokens_per_second']:.0f}"]
    return [*cells, *("" if value is None else f"{value:.2f}x" for value in speed_ups)]
