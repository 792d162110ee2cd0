"""Answer a question about pictures, or a text prompt, and stream the answer."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch

from vispec.cli.loading import DEMO, DTYPES, CommandError, load
from vispec.cli.prompts import make_inputs, open_pictures
from vispec.cli.running import answer, audit_lines, verdict_lines
from vispec.compare import audit, compare
from vispec.decode.exactness import EXACTNESS
from vispec.tree import TreeConfig

AUTO = "auto"
TREES = (AUTO, "fixed")
SAMPLING = ("top_k", "top_p", "min_p", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vispec generate`."""
    parser.add_argument("--model", required=True, help=f"folder, hub id, or {DEMO}")
    parser.add_argument("--draft", help=f"folder or hub id (--model {DEMO} has its own)")
    parser.add_argument("--no-draft", action="store_true", help="decode plainly on our engine")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="repeatable")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--top-k", type=int, metavar="N", help="sample among the N likeliest")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, help="of the sampling noise")
    add_tree_arguments(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as published")
    parser.add_argument("--device", default="auto", help="auto: a GPU where there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--compare", action="store_true", help="also run model.generate; compare tokens and speed")
    parser.add_argument(
        "--audit", action="store_true", help="check every token against one pass of the plain model over the answer"
    )
    parser.add_argument(
        "--exact",
        choices=EXACTNESS,
        default=EXACTNESS[0],
        help="guard: near-ties are decided one token at a time; self: the answer of --no-draft, bit by bit",
    )
    parser.add_argument("--show-tree", action="store_true", help="show every round's draft tree")


def add_tree_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares how the draft tree is chosen."""
    parser.add_argument(
        "--tree", choices=TREES, default=AUTO, help="auto: chosen round by round (the default); fixed: always the same"
    )
    parser.add_argument("--depth", type=int, metavar="N", help="of a fixed tree: levels after the first")
    parser.add_argument("--width", "--top-k-tree", dest="width", type=int, metavar="N", help="children of a node")
    parser.add_argument("--total-tokens", type=int, metavar="N", help="nodes verified a round")


def tree_of(arguments: argparse.Namespace, default: TreeConfig) -> TreeConfig | str:
    """The draft tree as it was asked for; any size makes it a fixed one."""
    given = {
        "depth": arguments.depth,
        "top_k": arguments.width,
        "total_tokens": arguments.total_tokens,
    }
    given = {name: size for name, size in given.items() if size is not None}
    return replace(default, **given) if given or arguments.tree != AUTO else AUTO


def set_threads(count: int | None) -> None:
    """Limits torch, and with it our CPU ops, to so many threads.

    Raises: CommandError for less than one.
    """
    if count is None:
        return
    if count < 1:
        raise CommandError(f"--threads must be at least 1, got {count}")
    torch.set_num_threads(count)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Generation options; raises CommandError where they contradict each other."""
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
    given = {name: getattr(arguments, name) for name in SAMPLING}
    given = {name: value for name, value in given.items() if value is not None}
    if not arguments.temperature:
        if given:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise CommandError(f"{names}: --temperature must be above 0, got 0 (greedy)")
        return {**options, "do_sample": False}
    if arguments.audit:
        raise CommandError(f"--audit needs greedy answers: --temperature must be 0, got {arguments.temperature}")
    if arguments.compare:
        raise CommandError(f"--compare needs greedy answers: --temperature must be 0, got {arguments.temperature}")
    return {**options, **given, "do_sample": True, "temperature": arguments.temperature}


def _check(arguments: argparse.Namespace) -> None:
    if arguments.draft and arguments.no_draft:
        raise CommandError("--draft and --no-draft must not be given together")
    if not arguments.draft and not arguments.no_draft and arguments.model != DEMO:
        raise CommandError("--draft must be a folder or a hub id, got nothing (--no-draft: without)")
    set_threads(arguments.threads)


def default_tree(model: str) -> TreeConfig:
    """What a fixed tree is where no sizes are given: the demo has its own, tuned for CPUs."""
    if model != DEMO:
        return TreeConfig()
    from vispec import demo

    return demo.TREE


def run(arguments: argparse.Namespace) -> int:
    """Runs `vispec generate`.

    Returns: 0, or 1 when `--compare` found another answer or `--audit` a token that is neither the argmax nor a tie.
    """
    _check(arguments)
    options = _options(arguments)
    tree = tree_of(arguments, default_tree(arguments.model))
    pictures = open_pictures(arguments.image)
    loaded = load(
        arguments.model,
        "" if arguments.no_draft else arguments.draft,
        dtype=arguments.dtype,
        device=arguments.device,
        quiet=arguments.json,
    )
    inputs = make_inputs(loaded.processor, arguments.prompt, pictures)
    found = answer(
        loaded,
        inputs,
        tree=tree,
        show_tree=arguments.show_tree,
        quiet=arguments.json,
        exact=arguments.exact,
        **options,
    )
    audited = None
    if arguments.audit:
        output = torch.cat([inputs["input_ids"], torch.tensor([found.tokens])], dim=1)
        audited = audit(loaded.model, inputs, output, do_sample=False)
    comparison = None
    if arguments.compare:
        del options["do_sample"]
        comparison = compare(loaded.model, loaded.draft, inputs, tree=tree, exact=arguments.exact, **options)
    if arguments.json:
        compared = None if comparison is None else comparison.as_dict()
        checked = None if audited is None else audited.as_dict()
        print(json.dumps({"model": arguments.model, **found.as_dict(), "comparison": compared, "audit": checked}))
    elif comparison is not None:
        print("\n" + "\n".join(verdict_lines(comparison)))
    else:
        print(
            f"\n{len(found.tokens)} tokens in {found.seconds:.2f} s "
            f"({len(found.tokens) / found.seconds:.1f} tokens/s), tau {found.stats.tau:.2f}, "
            f"{found.stats.tokens_per_round:.2f} tokens a round"
        )
    if audited is not None and not arguments.json:
        print("\n".join(audit_lines(audited)))
    passed = (comparison is None or comparison.identical) and (audited is None or audited.passed)
    return 0 if passed else 1
