"""Writes the tables of the README and of docs/ from the committed records: no figure is typed by hand.

python -m benchmarks.tables          # rewrite the marked blocks
python -m benchmarks.tables --check  # fail where they differ from the records
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine.page import floors, phases, rounds, unmeasured_phases
from benchmarks.ops import CASES
from benchmarks.record import RESULTS
from benchmarks.training import costs, curve, runs

ROOT = RESULTS.parent.parent
README = ROOT / "README.md"
ENGINE = ROOT / "docs" / "engine.md"
TRAINING = ROOT / "docs" / "training.md"


def lookup_text(row: dict[str, Any]) -> str:
    """The speed-up over prompt lookup, and on how many prompts that ran at all."""
    if row["speed_up_over_prompt_lookup"] is None:
        return "it fails on all prompts"
    return f"{row['speed_up_over_prompt_lookup']:.2f}x ({row['prompts_that_prompt_lookup_served']} prompts)"


def tree_text(row: dict[str, Any]) -> str:
    """The sizes of a fixed tree, or the mean number of nodes that were chosen."""
    tree = row["tree"]
    if isinstance(tree, str):
        return f"{tree}: {row['nodes_per_round']:.1f} nodes a round"
    return f"{tree['depth']}, {tree['top_k']}, {tree['total_tokens']}"


def speed(record: dict[str, Any]) -> list[str]:
    """Speed over plain generation, and where a round's time goes."""
    lines = [
        "| dtype | tree (depth, top_k, nodes) | tau | tokens a round | over `generate` | over prompt lookup "
        "| ties | draft / verify / accept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        shares = " / ".join(f"{row[f'{name}_share']:.0%}" for name in ("draft", "verify", "accept"))
        lines.append(
            f"| {row['dtype']} | {tree_text(row)} "
            f"| {row['tau']:.2f} | {row['tau'] + 1:.2f} "
            f"| {row['speed_up']:.2f}x | {lookup_text(row)} "
            f"| {row['ties']} of {row['prompts']} | {shares} |"
        )
    return lines


def memory(record: dict[str, Any]) -> list[str]:
    """Peak memory of one answer."""
    (row,) = record["rows"]
    return [
        "| | peak memory |",
        "|---|---|",
        *(
            f"| {name} | {row[f'{way}_peak_bytes'] / 2**20:.0f} MiB |"
            for way, name in (("load", "loading alone"), ("plain", "`generate`"), ("vispec", "`fast_generate`"))
        ),
    ]


def sweep(record: dict[str, Any]) -> list[str]:
    """Fixed trees beside "auto", which the last column compares them with."""
    auto = {row["dtype"]: row["speed_up"] for row in record["rows"] if row["tree"] == "auto"}
    return [
        '| dtype | tree (depth, top_k, nodes) | tau | over `generate` | "auto" over it |',
        "|---|---|---|---|---|",
        *(
            f"| {row['dtype']} | {tree_text(row)} | {row['tau']:.2f} | {row['speed_up']:.2f}x "
            f"| {auto[row['dtype']] / row['speed_up']:.2f}x |"
            for row in record["rows"]
        ),
    ]


def useless(record: dict[str, Any]) -> list[str]:
    """A draft of random weights under "auto" against plain decoding on the same engine."""
    return [
        "| dtype | over plain decoding here | rounds with a tree |",
        "|---|---|---|",
        *(
            f"| {row['dtype']} | {row['over_plain_decoding_here']:.2f}x | {row['rounds_with_a_tree']:.1%} |"
            for row in record["rows"]
        ),
    ]


def passes(record: dict[str, Any]) -> list[str]:
    """What a verification pass gains, by dtype and nodes."""
    ways = list(record["rows"][0]["over_own_layers"])
    return [
        f"| dtype | nodes | {' | '.join(ways)} | joined products alone |",
        "|---|---|" + "---|" * (len(ways) + 1),
        *(
            f"| {row['dtype']} | {row['nodes']} "
            f"| {' | '.join(f'{ratio:.2f}x' for ratio in row['over_own_layers'].values())} "
            f"| {row['joined_products_over_parts']:.2f}x |"
            for row in record["rows"]
        ),
    ]


KERNELS = list(dict.fromkeys(case.op for case in CASES))
UNMEASURED = "Not yet measured."


def kernels(record: dict[str, Any]) -> list[str]:
    """Every case of every kernel: time, floor, and what the same work takes in other ways."""
    lines = [
        "| kernel | case | time | floor | over the floor | target on an H100 | other ways |",
        "|---|---|---|---|---|---|---|",
    ]
    for kernel in KERNELS:
        rows = [row for row in record["rows"] if row["op"] == kernel]
        lines += [kernel_line(row) for row in rows] or [f"| `{kernel}` | not yet measured | | | | | |"]
    ceilings = record["ceilings"]
    return [
        *lines,
        "",
        f"Floor: bytes at {ceilings['copy_gigabytes_per_second']:.0f} GB/s or matrix operations at "
        f"{ceilings['matmul_teraflops']:.0f} TFLOP/s, both measured in the same run; a kernel that does nothing takes "
        f"{ceilings['smallest_kernel_microseconds']:.1f} µs.",
    ]


def kernel_line(row: dict[str, Any]) -> str:
    """One case."""
    if "failed" in row:
        return f"| `{row['op']}` | {row['case']} | failed | | | | |"
    target = row["target_microseconds_h100"]
    ways = [
        f"{way['name']}: failed"
        if "failed" in way
        else f"{way['name']}: {way['microseconds']:.1f} µs ({way['microseconds'] / row['microseconds']:.1f}x)"
        for way in row["baselines"]
    ]
    return (
        f"| `{row['op']}` | {row['case']} | {row['microseconds']:.1f} µs | {row['floor_microseconds']:.1f} µs "
        f"| {row['times_over_floor']:.1f}x | {'' if target is None else f'{target:g} µs'} | {'; '.join(ways)} |"
    )


def no_kernels() -> str:
    """Every kernel's name, and that there is no figure."""
    return "\n".join(["| kernel | |", "|---|---|", *(f"| `{kernel}` | not yet measured |" for kernel in KERNELS)])


@dataclass(frozen=True)
class Block:
    """A marked block of a page."""

    files: str | None
    """Pattern of the records' names; one table a record. None: what the block holds needs no record."""
    show: Callable[[dict[str, Any]], list[str]] | None
    without: Callable[[], str] = lambda: UNMEASURED
    """What the block holds where there is no record."""


README_BLOCKS = {
    "speed": Block("generate_cpu.json", speed),
    "memory": Block("memory_cpu.json", memory),
    "kernels": Block("ops_*.json", kernels, no_kernels),
}
ENGINE_BLOCKS = {
    "passes": Block("passes_cpu.json", passes),
    "sweep": Block("sweep_cpu.json", sweep),
    "useless": Block("random_draft_cpu.json", useless),
    "floors": Block(None, None, floors),
    "phases": Block("engine_*.json", phases, unmeasured_phases),
    "rounds": Block("engine_*.json", rounds),
}
TRAINING_BLOCKS = {
    "costs": Block(costs.RECORD.name, costs.shown),
    "curve": Block(curve.RECORD.name, curve.shown),
    "runs": Block(runs.RECORD.name, runs.shown, lambda: "\n".join(runs.shown({"rows": []}))),
}
PAGES = {README: README_BLOCKS, ENGINE: ENGINE_BLOCKS, TRAINING: TRAINING_BLOCKS}


def source(record: dict[str, Any]) -> str:
    """One line that says where the figures come from."""
    about = record["circumstances"]
    hardware = about["gpu"] or f"{about['cpu']}, {about['cpu_threads']} threads"
    driver = f"driver {about['gpu_state']['driver_version']}, " if about.get("gpu_state") else ""
    changed = " with uncommitted changes" if about["uncommitted_changes"] else ""
    return (
        f"Measured on {hardware}; {driver}torch {about['torch']}, transformers {about['transformers']}, "
        f"commit {(about['commit'] or 'unknown')[:10]}{changed}."
    )


def rendered(text: str, results: Path = RESULTS, page: Path = README) -> str:
    """A page with every marked block written anew."""
    for name, block in PAGES[page].items():
        files = sorted(results.glob(block.files)) if block.files else ()
        records = [json.loads(path.read_text()) for path in files]
        tables = ["\n".join([*block.show(record), "", source(record)]) for record in records]
        body = "\n\n".join(tables) or block.without()
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"tables: {page.name} must hold the block <!-- {name} --> ... <!-- /{name} -->")
        text = pattern.sub(lambda match, body=body: match[1] + body + match[2], text)
    return text


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        wanted = rendered(text, page=page)
        if "--check" not in sys.argv[1:]:
            page.write_text(wanted)
        elif text != wanted:
            raise SystemExit(f"tables: {page.name} differs from benchmarks/results; run python -m benchmarks.tables")


if __name__ == "__main__":
    main()
