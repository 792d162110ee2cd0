"""Whole answers against plain generation, in turn in one process: speed, phases of a round, peak memory.

    python -m benchmarks.bench_generate                    # the demo model and its pictures
    python -m benchmarks.bench_generate --tree fixed       # the demo's own tree alone, without "auto"
    python -m benchmarks.bench_generate --sweep            # several trees, and "auto"
    python -m benchmarks.bench_generate --random-draft     # what a draft of random weights may lose
    python -m benchmarks.bench_generate --memory           # peak memory, each way in a process of its own
    python -m benchmarks.bench_generate --json benchmarks/results/generate.json

On a CPU only ratios mean anything: the runs take turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import vispec
from benchmarks.record import peak_resident_bytes, write
from vispec import demo
from vispec.cli.prompts import make_inputs, open_pictures
from vispec.compare import Comparison, compare

SWEEP = [
    vispec.TreeConfig(depth=depth, top_k=top_k, total_tokens=nodes)
    for depth, top_k, nodes in (
        (1, 2, 4),
        (2, 2, 6),
        (2, 3, 8),
        (3, 2, 8),
        (3, 3, 12),
        (3, 4, 16),
        (4, 2, 10),
        (4, 3, 16),
        (3, 8, 30),
    )
]
console = Console()


def prompts(processor: Any, count: int | None) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """The demo's pictures with their prompts, as the model reads them."""
    return [
        (sample.path.name, make_inputs(processor, sample.prompt, open_pictures([sample.path])))
        for sample in demo.samples()[:count]
    ]


def summarise(tree: vispec.TreeConfig | str, found: list[Comparison]) -> dict[str, Any]:
    """One row of figures over all prompts of one tree; refuses to time a wrong answer."""
    wrong = [comparison.verdict for comparison in found if not comparison.identical]
    if wrong:
        raise SystemExit(f"bench_generate: an answer differs from plain generation: {wrong[0]}")
    phases = {
        name: sum(getattr(comparison.stats, f"{name}_seconds") for comparison in found)
        for name in ("prefill", "draft", "verify", "accept")
    }
    rounds = sum(phases[name] for name in ("draft", "verify", "accept"))

    def rate(name: str, comparisons: list[Comparison] = found) -> float:
        runs = [getattr(comparison, name) for comparison in comparisons]
        return sum(run.new_tokens for run in runs) / sum(run.seconds for run in runs)

    # Prompt lookup is transformers' own and may refuse a prompt.
    looked_up = [comparison for comparison in found if comparison.prompt_lookup is not None]
    return {
        "tree": tree if isinstance(tree, str) else asdict(tree),
        "nodes_per_round": statistics.fmean(
            nodes for comparison in found for nodes in comparison.stats.nodes_per_round
        ),
        "prompts": len(found),
        "new_tokens": sum(comparison.vispec.new_tokens for comparison in found),
        "ties": sum(comparison.verdict.startswith("identical: tie") for comparison in found),
        "tau": statistics.fmean(tau for comparison in found for tau in comparison.stats.accepted_per_round),
        "speed_up": rate("vispec") / rate("plain"),
        "prompts_that_prompt_lookup_served": len(looked_up),
        "speed_up_over_prompt_lookup": rate("vispec", looked_up) / rate("prompt_lookup", looked_up)
        if looked_up
        else None,
        "draft_share": phases["draft"] / rounds,
        "verify_share": phases["verify"] / rounds,
        "accept_share": phases["accept"] / rounds,
        "prefill_seconds": phases["prefill"],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures for people."""
    shown = Table(title="against model.generate, same prompts, run in turn")
    for column in ("dtype", "tree", "nodes", "tau", "speed-up", "over lookup", "draft", "verify", "accept"):
        shown.add_column(column, justify="right")
    for row in rows:
        tree, lookup = row["tree"], row["speed_up_over_prompt_lookup"]
        shown.add_row(
            row["dtype"],
            tree if isinstance(tree, str) else ", ".join(str(size) for size in tree.values()),
            f"{row['nodes_per_round']:.1f}",
            f"{row['tau']:.2f}",
            f"{row['speed_up']:.2f}x",
            "" if lookup is None else f"{lookup:.2f}x",
            *(f"{row[f'{name}_share']:.0%}" for name in ("draft", "verify", "accept")),
        )
    return shown


def measure_speed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a dtype and tree."""
    rows = []
    trees: list[vispec.TreeConfig | str] = ["auto" if tree == "auto" else demo.TREE for tree in arguments.tree]
    if arguments.sweep:
        trees = ["auto", *SWEEP]
    for dtype in arguments.dtypes:
        model, draft, processor = demo.load(dtype=getattr(torch, dtype))
        vispec.join_projections(model)
        inputs = prompts(processor, arguments.pictures)
        for tree in trees:
            found = [
                compare(
                    model,
                    draft,
                    prompt,
                    tree=tree,
                    max_new_tokens=arguments.max_new_tokens,
                    repeats=arguments.repeats,
                    prompt_lookup=not arguments.sweep,
                )
                for _, prompt in track(inputs, description=f"{dtype} {tree}", console=console, transient=True)
            ]
            rows.append({"dtype": dtype, **summarise(tree, found)})
            console.print(table(rows[-1:]))
    return rows


def measure_useless(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a dtype: what a draft of random weights loses under "auto" against plain decoding here, in turn."""
    rows = []
    for dtype in arguments.dtypes:
        model, _, processor = demo.load(dtype=getattr(torch, dtype))
        vispec.join_projections(model)
        torch.manual_seed(0)
        random = vispec.ViSpecDraft.for_target(model)
        seconds, nodes = {"none": 0.0, "random": 0.0}, []
        for _, prompt in prompts(processor, arguments.pictures):
            turns: dict[str, list[float]] = {name: [] for name in seconds}
            for _ in range(arguments.repeats):
                for name, draft in (("none", None), ("random", random)):
                    start = time.perf_counter()
                    found = vispec.fast_generate(
                        model,
                        draft,
                        prompt,
                        # As many tokens either way, though near-ties may fall otherwise.
                        min_new_tokens=arguments.max_new_tokens,
                        max_new_tokens=arguments.max_new_tokens,
                        do_sample=False,
                        return_dict_in_generate=True,
                    )
                    turns[name].append(time.perf_counter() - start)
                    nodes += found.stats.nodes_per_round if draft is not None else []
            for name, taken in turns.items():
                seconds[name] += statistics.median(taken)
        speculated = statistics.fmean(count > 1 for count in nodes)
        rows.append(
            {
                "dtype": dtype,
                "over_plain_decoding_here": seconds["none"] / seconds["random"],
                "rounds_with_a_tree": speculated,
            }
        )
        console.print(f"{dtype}: {rows[-1]['over_plain_decoding_here']:.3f}x, {speculated:.1%} of rounds with a tree")
    return rows


def peak_of_child(way: str, arguments: argparse.Namespace) -> int:
    """Peak resident memory in bytes of a process that answers the first prompt one way."""
    command = [sys.executable, "-m", "benchmarks.bench_generate", "--child", way]
    command += ["--max-new-tokens", str(arguments.max_new_tokens)]
    command += ["--dtypes", arguments.dtypes[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def child(arguments: argparse.Namespace) -> None:
    """Answers one prompt plainly or with the draft and prints its own peak memory."""
    model, draft, processor = demo.load(dtype=getattr(torch, arguments.dtypes[0]))
    vispec.join_projections(model)
    (_, inputs), *_ = prompts(processor, 1)
    if arguments.child == "plain":
        model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    elif arguments.child == "vispec":
        vispec.fast_generate(
            model, draft, inputs, tree=demo.TREE, max_new_tokens=arguments.max_new_tokens, do_sample=False
        )
    print(json.dumps({"peak_bytes": peak_resident_bytes()}))


def measure_memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Peaks of loading alone, plain generation and ours; the draft is loaded in all three."""
    peaks = {way: peak_of_child(way, arguments) for way in ("load", "plain", "vispec")}
    row = {f"{way}_peak_bytes": peak for way, peak in peaks.items()}
    row["vispec_over_plain"] = peaks["vispec"] / peaks["plain"]
    console.print(
        f"peak memory: load {peaks['load'] / 2**20:.0f} MiB, plain {peaks['plain'] / 2**20:.0f} MiB, "
        f"vispec {peaks['vispec'] / 2**20:.0f} MiB ({row['vispec_over_plain']:.2f}x plain)"
    )
    return [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--pictures", type=int, help="use only the first so many pictures")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each way, in turn; the fastest counts")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument(
        "--tree", nargs="+", choices=("auto", "fixed"), default=["auto", "fixed"], help="fixed: the demo's own"
    )
    parser.add_argument("--random-draft", action="store_true", help="what a draft of random weights loses against none")
    parser.add_argument("--sweep", action="store_true", help="try several trees")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of speed")
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--child", choices=("load", "plain", "vispec"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.child:
        child(arguments)
        return
    name, measure = "generate", measure_speed
    if arguments.memory:
        name, measure = "generate memory", measure_memory
    elif arguments.random_draft:
        name, measure = "generate random draft", measure_useless
    rows = measure(arguments)
    if arguments.json:
        write(arguments.json, name, rows)


if __name__ == "__main__":
    main()
