"""Answer questions about the shipped pictures, and compare with plain generation."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from vispec.cli.generate import add_tree_arguments, default_tree, set_threads, tree_of
from vispec.cli.loading import DEMO, DTYPES, CommandError, Loaded, load
from vispec.cli.prompts import make_inputs, open_pictures
from vispec.cli.running import Answer, answer, verdict_lines
from vispec.compare import Comparison, compare
from vispec.tree import TreeConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vispec demo`."""
    parser.add_argument("--pictures", type=int, metavar="N", help="only the first N pictures")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="timed runs of each")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: float32")
    parser.add_argument("--device", default="auto", help="auto: a GPU where there is one")
    parser.add_argument("--show-tree", action="store_true", help="show every round's draft tree")
    add_tree_arguments(parser)


class Shown(NamedTuple):
    """One picture's answer and what the comparison found."""

    name: str
    credit: str
    prompt: str
    answer: Answer
    comparison: Comparison

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "picture": self.name,
            "credit": self.credit,
            "prompt": self.prompt,
            "answer": self.answer.as_dict(),
            "comparison": self.comparison.as_dict(),
        }


def run(arguments: argparse.Namespace) -> int:
    """Runs `vispec demo`. Returns: 0, or 1 when any answer differs from plain generation's."""
    from vispec import demo

    if arguments.pictures is not None and arguments.pictures < 1:
        raise CommandError(f"--pictures must be at least 1, got {arguments.pictures}")
    set_threads(arguments.threads)
    tree = tree_of(arguments, default_tree(DEMO))
    loaded = load(DEMO, None, dtype=arguments.dtype, device=arguments.device, quiet=arguments.json)
    samples = demo.samples()[: arguments.pictures]
    shown = [_show(sample, loaded, tree, arguments) for sample in samples]
    if arguments.json:
        shape = vars(tree) if isinstance(tree, TreeConfig) else tree
        print(json.dumps({"tree": shape, "pictures": [one.as_dict() for one in shown]}))
    else:
        Console().print(_summary(shown))
    different = [one.name for one in shown if not one.comparison.identical]
    if different:
        print(f"demo: other tokens than plain generation: {', '.join(different)}", file=sys.stderr)
    return 1 if different else 0


def _show(sample: Any, loaded: Loaded, tree: TreeConfig | str, arguments: argparse.Namespace) -> Shown:
    name = sample.path.stem
    if not arguments.json:
        console = Console(highlight=False)
        console.rule(name)
        console.print(sample.credit, style="dim", markup=False)
        console.print(sample.prompt, style="italic", markup=False)
    inputs = make_inputs(loaded.processor, sample.prompt, open_pictures([sample.path]))
    limit = arguments.max_new_tokens
    found = answer(
        loaded,
        inputs,
        tree=tree,
        show_tree=arguments.show_tree,
        quiet=arguments.json,
        max_new_tokens=limit,
        do_sample=False,
    )
    comparison = compare(
        loaded.model,
        loaded.draft,
        inputs,
        tree=tree,
        max_new_tokens=limit,
        repeats=arguments.repeats,
    )
    if not arguments.json:
        print("\n" + "\n".join(verdict_lines(comparison)) + "\n")
    return Shown(name, sample.credit, sample.prompt, found, comparison)


def _summary(shown: list[Shown]) -> Table:
    table = Table(caption="plain, vispec: tokens/s of model.generate and of ours, run in turn")
    table.add_column("picture", no_wrap=True)
    table.add_column("identical", min_width=9)
    for title in ("tokens", "tau", "a round", "plain", "vispec", "speed-up"):
        table.add_column(title, justify="right", no_wrap=True)
    plain_seconds = sum(one.comparison.plain.seconds for one in shown)
    seconds = sum(one.comparison.vispec.seconds for one in shown)
    plain_tokens = sum(one.comparison.plain.new_tokens for one in shown)
    tokens = sum(one.comparison.vispec.new_tokens for one in shown)
    accepted = [count for one in shown for count in one.comparison.stats.accepted_per_round]
    tau = sum(accepted) / len(accepted) if accepted else 0.0
    for one in shown:
        found = one.comparison
        table.add_row(
            one.name,
            found.verdict.removeprefix("identical: ").partition(" (")[0],
            *_numbers(
                found.vispec.new_tokens,
                found.tau,
                found.plain.tokens_per_second,
                found.vispec.tokens_per_second,
            ),
        )
    table.add_section()
    table.add_row("all", "", *_numbers(tokens, tau, plain_tokens / plain_seconds, tokens / seconds))
    return table


def _numbers(tokens: int, tau: float, plain_speed: float, speed: float) -> list[str]:
    return [
        str(tokens),
        f"{tau:.2f}",
        f"{tau + 1:.2f}",
        f"{plain_speed:.1f}",
        f"{speed:.1f}",
        f"{speed / plain_speed:.2f}x",
    ]
