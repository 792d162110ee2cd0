"""Full-size targets with random weights: what a round costs, and how near to the memory's floor it is.

    python -m benchmarks.bench_engine                                   # all targets, contexts 512 to 16384, batch 1
    python -m benchmarks.bench_engine --targets qwen2.5-vl-3b --contexts 2048 --batches 1 2 4 8 16
    python -m benchmarks.bench_engine --compiled                        # also Hugging Face's compiled static cache
    python -m benchmarks.bench_engine --quantised int8                  # layers of 8-bit weights
    python -m benchmarks.bench_engine --profile traces --plot figures.svg
    python -m benchmarks.bench_engine --check                           # tiny targets on any machine; no times

The machinery alone is measured: a replay draft does the work of a ViSpec draft of that size and then proposes the
true continuation, so that rounds accept the published tau. How often a real draft is right is another question.

- A round: the difference of a long and a short answer, which leaves the prefill out, over the difference of their
  rounds; rounds are CUDA graphs then. `replayed_round` is such a graph on the device alone, `host_ms_a_round` what the
  host works in a round.
- Its phases: from rounds that run call by call, between CUDA events. No synchronisation is in them, and the device is
  held back until the host has queued the round, so that no launch is in the times either (`phases_queued_in_time`: in
  which share of the rounds that held).
- Floors: `benchmarks/engine/floors.py`, with the bandwidth of a copy and the rate of a large product measured in the
  same run. The prompts are text, so the draft's cache is as long as the target's.

A case that does not fit into the GPU's memory is recorded as such.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import vispec
from benchmarks.engine.case import LONG, SHORT, Case, measure, unless_out_of_memory
from benchmarks.engine.floors import Machine, Setting
from benchmarks.engine.quantised import quantise
from benchmarks.engine.roofline import draw
from benchmarks.engine.targets import SHAPES, TINY_SHAPES, Shape
from benchmarks.ops.timing import measure_ceilings
from benchmarks.pictures import check_plotting
from benchmarks.record import write

CONTEXTS = [512, 2048, 4096, 8192, 16384]
TINY_CONTEXT = 24
CEILING_REPLAYS = 5
QUANTISED = ("int8",)
console = Console()


@dataclass(frozen=True)
class Asked:
    """What the command line asks of each case; `machine` None: no times."""

    machine: Machine | None
    repeats: int = 3
    compiled: bool = False
    profile: Path | None = None
    draft_weights: str | None = None


def build(shape: Shape, dtype: torch.dtype, device: str, quantised: str | None) -> PreTrainedModel:
    """The target, its layers of 8-bit weights where that is asked for, other weights laid together."""
    model = shape.build(dtype, device)
    if quantised:
        quantise(model)
    vispec.join_projections(model)
    return model


def rows_of(
    name: str, shape: Shape, model: PreTrainedModel, settings: list[Setting], asked: Asked
) -> Iterator[dict[str, Any]]:
    """One row a setting."""
    for setting in settings:
        about = {"context": setting.context, "batch": setting.batch}

        def run(setting: Setting = setting) -> dict[str, Any]:
            case = Case(shape, model, setting, LONG if asked.machine else SHORT, asked.draft_weights)
            if asked.profile is not None:
                case.profile(asked.profile, f"{name}_{setting.context}_{setting.batch}")
            return measure(case, asked.machine, asked.repeats, asked.compiled)

        found = unless_out_of_memory(run)
        yield {"target": name, **({**about, "out_of_memory": ["vispec"]} if found is None else found)}


def check(profile: Path | None = None) -> list[dict[str, Any]]:
    """The same code on tiny targets: rounds must accept what they are told to.

    Raises: SystemExit where they do not.
    """
    rows = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, shape in TINY_SHAPES.items():
        for quantised in (None, *QUANTISED):
            model = build(shape, torch.float32, device, quantised)
            settings = [Setting(TINY_CONTEXT, TINY_CONTEXT, batch) for batch in (1, 2)]
            for row in rows_of(name, shape, model, settings, Asked(None, profile=profile, draft_weights=quantised)):
                # The last round is cut at the answer's end.
                if abs(row["tau"] - shape.tau) > 0.5:
                    raise SystemExit(f"bench_engine: {name} must accept about {shape.tau} tokens a round: {row}")
                rows.append({"quantised": quantised, **row})
    return rows


def table(row: dict[str, Any]) -> Table:
    """The figures of one case for people."""
    title = f"{row['target']}, context {row['context']}, batch {row['batch']}"
    if "round" not in row:
        return Table(title=f"{title}: more memory than there is")
    shown = Table(title=title)
    for column in ("", "ms", "floor", "times"):
        shown.add_column(column, justify="right" if column else "left")
    parts = {
        "plain step": row["plain_step"],
        "round": row["round"],
        "round, on the device": row["replayed_round"],
        **{f"  {name}": figures for name, figures in row["phases"].items()},
        "adaptor": row["adaptor"],
    }
    for name, figures in parts.items():
        if figures is None:
            shown.add_row(name, "not captured")
        else:
            shown.add_row(
                name, f"{figures['ms']:.3f}", f"{figures['floor_ms']:.3f}", f"{figures['times_over_floor']:.2f}"
            )
    for way in ("own_plain", "generate_eager", "generate_compiled"):
        speed_up = row[f"speed_up_over_{way}"]
        shown.add_row(f"speed-up over {way.replace('_', ' ')}", "-" if speed_up is None else f"{speed_up:.2f}x")
    host = row["host_ms_a_round"]
    shown.add_row("host, a round", "-" if host is None else f"{host:.3f}")
    shown.add_row("tokens a second", f"{row['tokens_per_second']:.0f}")
    return shown


def measured_machine() -> tuple[Machine, dict[str, float]]:
    """This GPU as measured now, and the figures for the record."""
    ceilings = measure_ceilings(CEILING_REPLAYS)
    torch.cuda.empty_cache()
    copy, product = ceilings.copy_gigabytes_per_second, ceilings.matmul_teraflops
    console.print(f"device copy: {copy:.0f} GB/s; product: {product:.0f} TFLOP/s")
    machine = Machine("measured", copy * 1e9, product * 1e12)
    return machine, {"copy_gigabytes_per_second": copy, "matmul_teraflops": product}


def full_size(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures what was asked for; the record is written after every row."""
    machine, ceilings = measured_machine()
    asked = Asked(machine, arguments.repeats, arguments.compiled, arguments.profile, arguments.draft_weights)
    draft_bytes = 1 if arguments.draft_weights else 2
    rows: list[dict[str, Any]] = []
    for name in arguments.targets:
        shape = SHAPES[name]
        settings = [
            Setting(
                context,
                context,
                batch,
                weight_bytes=1 if arguments.quantised else 2,
                draft_weight_bytes=draft_bytes,
            )
            # Ascending, because `generate` keeps a static cache at the greatest length that it has had.
            for context in sorted(arguments.contexts)
            for batch in arguments.batches
        ]
        model = unless_out_of_memory(lambda shape=shape: build(shape, torch.bfloat16, "cuda", arguments.quantised))
        if model is None:
            console.print(f"{name}: more memory than there is")
            found = iter([{"target": name, "context": None, "batch": None, "out_of_memory": ["weights"]}])
        else:
            found = rows_of(name, shape, model, settings, asked)
        for row in found:
            about = {"quantised": arguments.quantised, "draft_weights": arguments.draft_weights}
            rows.append({"dtype": "bfloat16", **about, **row})
            if model is not None:
                console.print(table(row))
            if arguments.json:
                write(arguments.json, "engine", rows, ceilings=ceilings)
        del model, found
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="also measure generate's compiled static cache")
    parser.add_argument("--quantised", choices=QUANTISED, help="widen layers of 8-bit weights before each product")
    parser.add_argument("--draft-weights", choices=QUANTISED, help="the draft's rounds read 8-bit weights")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write Chrome traces of a few rounds a case")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw times and floors (SVG or PNG; needs matplotlib)"
    )
    parser.add_argument("--check", action="store_true", help="tiny targets, no times")
    parser.add_argument("--json", help="write the record here after every row")
    arguments = parser.parse_args()
    if arguments.plot:
        check_plotting("bench_engine: --plot")
    if arguments.check:
        rows = check(arguments.profile)
        for row in rows:
            console.print(row)
    elif not torch.cuda.is_available():
        raise SystemExit("bench_engine: full-size targets need a CUDA device; --check runs tiny ones anywhere")
    else:
        rows = full_size(arguments)
    if arguments.plot:
        draw(arguments.plot, rows)


if __name__ == "__main__":
    main()
