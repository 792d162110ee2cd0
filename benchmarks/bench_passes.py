"""One verification pass by its parts and its nodes: what our ops, joined weights and `exact="self"` do to its time.

    python -m benchmarks.bench_passes                                            # the demo's model
    python -m benchmarks.bench_passes --json benchmarks/results/passes_cpu.json

The ways take turns and the fastest pass of each counts, so that their ratios hold on a busy machine too.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import vispec
from benchmarks.record import write
from vispec import demo, ops
from vispec.targets import load_target, row_exact
from vispec.targets.fused import GATE_UP, QUERIES_KEYS_VALUES
from vispec.tree import DraftTree, chain_words

PROMPT = 300  # tokens, as many as a picture with its question makes
OWN = "the model's own layers"
console = Console()


def chain(nodes: int, vocabulary: int) -> DraftTree:
    """A chain of tokens, which costs what any tree of its size does."""
    places = torch.arange(nodes)[None]
    return DraftTree(
        tokens=torch.randint(vocabulary, (1, nodes), generator=torch.Generator().manual_seed(nodes)),
        parents=places - 1,
        depths=places,
        ancestors=chain_words(1, nodes, places.device),
        scores=torch.zeros(1, nodes),
        longest_path=nodes,
    )


def fastest(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest run of each way; they take turns."""
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def passes(model: Any, joined: Any, nodes: int, repeats: int) -> dict[str, float]:
    """Seconds of a pass over `nodes` nodes in every way that there is."""
    tokens = torch.randint(1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    plain, together = load_target(model), load_target(joined)
    prompt = plain.prefill(inputs)
    tree, cache = chain(nodes, plain.vocabulary), prompt.cache

    def own() -> torch.Tensor:
        with ops.use_backend("reference"):
            return plain.verify(tree, prompt.next_positions, cache)[0]

    ways: dict[str, Callable[[], torch.Tensor]] = {
        OWN: own,
        "our ops": lambda: plain.verify(tree, prompt.next_positions, cache)[0],
        "joined weights": lambda: together.verify(tree, prompt.next_positions, cache)[0],
    }
    if nodes <= ops.PATH_NODES:
        exact = row_exact(together)
        ways['exact="self"'] = lambda: exact.verify(tree, prompt.next_positions, cache)[0]
    expected = own().float()
    for name, run in ways.items():
        # Two roundings of one pass: as near to each other as a format of 8 bits lets them be.
        error = (run().float() - expected).abs().mean() / expected.abs().mean()
        if not error < (0.03 if plain.dtype is torch.bfloat16 else 1e-4):
            raise SystemExit(f"bench_passes: {name} differs from {OWN} by {error:.2g} of the logits")
    return fastest(ways, repeats)


def products(model: Any, joined: Any, rows: int, repeats: int) -> dict[str, float]:
    """Seconds of all products that can be joined, over `rows` rows, in parts and as wholes."""
    groups = [
        [getattr(getattr(layer, part), name).weight for name in names]
        for layer in load_target(joined).decoder.layers
        for part, names in (QUERIES_KEYS_VALUES, GATE_UP)
    ]
    wholes = [torch.cat(group) for group in groups]
    hidden = torch.randn(rows, wholes[0].shape[1], generator=torch.Generator().manual_seed(0)).to(wholes[0].dtype)
    ways = {
        "in parts": lambda: [F.linear(hidden, weight) for group in groups for weight in group],
        "as wholes": lambda: [F.linear(hidden, whole) for whole in wholes],
    }
    return fastest(ways, repeats)


def measure(dtype: str, sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """One row of ratios for each number of nodes."""
    model, _, _ = demo.load(dtype=getattr(torch, dtype))
    joined = copy.deepcopy(model)
    vispec.join_projections(joined)
    rows = []
    with torch.inference_mode():
        for nodes in sizes:
            seconds = passes(model, joined, nodes, repeats)
            parts = products(model, joined, nodes, repeats)
            rows.append(
                {
                    "dtype": dtype,
                    "nodes": nodes,
                    "over_own_layers": {name: seconds[OWN] / value for name, value in seconds.items() if name != OWN},
                    "joined_products_over_parts": parts["in parts"] / parts["as wholes"],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 2, 4, 8, 16, 30])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    parser.add_argument("--json", help="write the record here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = [row for dtype in arguments.dtypes for row in measure(dtype, arguments.nodes, arguments.repeats)]
    shown = Table("dtype", "nodes", *rows[0]["over_own_layers"], "products", title=f"speed over {OWN}")
    for row in rows:
        ratios = [*row["over_own_layers"].values(), row["joined_products_over_parts"]]
        shown.add_row(row["dtype"], str(row["nodes"]), *(f"{ratio:.2f}x" for ratio in ratios))
    console.print(shown)
    if arguments.json:
        write(arguments.json, "passes", rows)


if __name__ == "__main__":
    main()
