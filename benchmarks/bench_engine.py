"""Full-size targets with random weights: what a round costs, and how near to the memory's floor it is.

    python -m benchmarks.bench_engine                                   # all targets, contexts 512 to 4096, batch 1
    python -m benchmarks.bench_engine --targets qwen2.5-vl-3b --contexts 2048 16384 --batches 1 4 16
    python -m benchmarks.bench_engine --compiled                        # also Hugging Face's compiled static cache
    python -m benchmarks.bench_engine --check                           # tiny targets on any machine; no times

The machinery alone is measured: a replay draft does the work of a ViSpec draft of that size and then proposes the
true continuation, so that rounds accept the published tau. How often a real draft is right is another question.

A way's time for one token (or round) is the difference of a long and a short answer over the difference of their
lengths, which leaves the prefill out. The floor is what must be read from memory, over the bandwidth of a device copy
measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import vispec
from benchmarks.engine.replay import PacedDraft
from benchmarks.engine.targets import SHAPES, TINY_SHAPES, Shape, prompts
from benchmarks.record import write

SHORT, LONG = 16, 112  # new tokens of the two answers
TREE = vispec.TreeConfig()
DRAFT_PASSES = TREE.depth + 1
console = Console()


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a device copy, reads and writes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(times)


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of a call until the device is done."""
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def per_token(answer: Callable[[int], Any], repeats: int) -> float:
    """Seconds that one more token costs."""
    answer(SHORT)
    found = [(seconds(lambda: answer(LONG)) - seconds(lambda: answer(SHORT))) / (LONG - SHORT) for _ in range(repeats)]
    return statistics.median(found)


def true_answers(model: PreTrainedModel, real: vispec.ViSpecDraft, inputs: dict[str, Tensor], tokens: int) -> Tensor:
    """What verification says, [B, tokens]: with trees of the measured size, so that near-ties fall the same way."""
    junk = torch.zeros(len(inputs["input_ids"]), 2, dtype=torch.int64, device=model.device)
    draft = PacedDraft(real, junk, 0.0, TREE)
    found = vispec.fast_generate(model, draft, inputs, tree=TREE, max_new_tokens=tokens, do_sample=False)
    return found[:, inputs["input_ids"].shape[1] :]


def measure(
    shape: Shape, model: PreTrainedModel, context: int, batch: int, bandwidth: float | None, arguments: Any
) -> dict[str, Any]:
    """One row of figures; without `bandwidth` (no GPU) only what needs no clock."""
    device = str(model.device)
    inputs = prompts(shape, context, batch, device)
    real = vispec.ViSpecDraft.for_target(model)
    longest = LONG if bandwidth else SHORT
    draft = PacedDraft(real, true_answers(model, real, inputs, longest), shape.tau, TREE)

    def speculate(tokens: int) -> vispec.GenerationResult:
        return vispec.fast_generate(
            model,
            draft,
            inputs,
            tree=TREE,
            max_new_tokens=tokens,
            do_sample=False,
            graphs=True,
            return_dict_in_generate=True,
        )

    stats = speculate(longest).stats
    row: dict[str, Any] = {
        "context": context,
        "batch": batch,
        "tree": {"depth": TREE.depth, "top_k": TREE.top_k, "total_tokens": TREE.total_tokens},
        "published_tau": shape.tau,
        "tau": stats.tau,
        "rounds": stats.rounds,
    }
    if bandwidth is None:
        return row

    def plain(tokens: int) -> Any:
        return vispec.fast_generate(model, None, inputs, max_new_tokens=tokens, do_sample=False)

    def eager(tokens: int) -> Any:
        return model.generate(**inputs, max_new_tokens=tokens, do_sample=False)

    def compiled(tokens: int) -> Any:
        return model.generate(**inputs, max_new_tokens=tokens, do_sample=False, cache_implementation="static")

    step = per_token(plain, arguments.repeats)
    token = per_token(speculate, arguments.repeats)
    element = 2
    step_floor = shape.step_bytes(context, batch, element) / bandwidth
    round_floor = step_floor + shape.draft_bytes(DRAFT_PASSES, element) / bandwidth
    # Rows of a batch end their rounds together; the slowest row's tokens a round count.
    tokens_a_round = (LONG - SHORT) / (speculate(LONG).stats.rounds - speculate(SHORT).stats.rounds)
    row |= {
        "plain_step_ms": step * 1e3,
        "plain_step_floor_ms": step_floor * 1e3,
        "plain_times_over_floor": step / step_floor,
        "round_ms": token * tokens_a_round * 1e3,
        "round_floor_ms": round_floor * 1e3,
        "round_times_over_floor": token * tokens_a_round / round_floor,
        "tokens_a_round": tokens_a_round,
        "tokens_per_second": batch / token,
        "speed_up_over_own_plain": step / token,
        "generate_eager_ms": None,
        "speed_up_over_generate_eager": None,
        "generate_compiled_ms": None,
    }
    slow = per_token(eager, 1)
    row |= {"generate_eager_ms": slow * 1e3, "speed_up_over_generate_eager": slow / token}
    if arguments.compiled:
        row["generate_compiled_ms"] = per_token(compiled, 1) * 1e3
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures for people."""
    shown = Table(title="milliseconds; x: times over the floor")
    for column in ("target", "context", "batch", "tau", "round", "x", "plain step", "x", "over plain", "over generate"):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            row["target"],
            str(row["context"]),
            str(row["batch"]),
            f"{row['tau']:.2f}",
            f"{row['round_ms']:.2f}",
            f"{row['round_times_over_floor']:.2f}",
            f"{row['plain_step_ms']:.2f}",
            f"{row['plain_times_over_floor']:.2f}",
            f"{row['speed_up_over_own_plain']:.2f}x",
            f"{row['speed_up_over_generate_eager']:.2f}x",
        )
    return shown


def check() -> list[dict[str, Any]]:
    """The same code on tiny targets: rounds must accept what they are told to."""
    rows = []
    for name, shape in TINY_SHAPES.items():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = shape.build(torch.float32, device)
        for batch in (1, 2):
            row = {"target": name, **measure(shape, model, 24, batch, None, None)}
            # The last round is cut at the answer's end.
            if abs(row["tau"] - shape.tau) > 0.5:
                raise SystemExit(f"bench_engine: {name} must accept about {shape.tau} tokens a round: {row}")
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 4096])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="also measure generate's compiled static cache")
    parser.add_argument("--check", action="store_true", help="tiny targets, no times")
    parser.add_argument("--json", help="write the record here after every row")
    arguments = parser.parse_args()
    if arguments.check:
        for row in check():
            console.print(row)
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench_engine: full-size targets need a CUDA device; --check runs tiny ones anywhere")
    rows: list[dict[str, Any]] = []
    bandwidth = copy_bandwidth("cuda")
    console.print(f"device copy: {bandwidth / 1e9:.0f} GB/s")
    for name in arguments.targets:
        shape = SHAPES[name]
        model = shape.build(torch.bfloat16, "cuda")
        for context in arguments.contexts:
            for batch in arguments.batches:
                row = measure(shape, model, context, batch, bandwidth, arguments)
                rows.append({"target": name, "dtype": "bfloat16", "copy_gb_per_second": bandwidth / 1e9, **row})
                console.print(table(rows[-1:]))
                if arguments.json:
                    write(arguments.json, "engine", rows)
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
