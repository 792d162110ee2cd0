"""`vispec train collect`, `fit` and `eval`: the same as `python -m vispec.train`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from vispec.train.collect import EXTENSION, CollectConfig, collect
from vispec.train.config import FitConfig, read_config
from vispec.train.data import read_dataset, read_manifest, write_atomically
from vispec.train.evaluate import evaluate
from vispec.train.fit import fit
from vispec.train.plot import check_plotting, plot_figures
from vispec.train.processes import Processes
from vispec.train.sources import open_source

DTYPES = ("auto", "bfloat16", "float16", "float32")
LISTED_SKIPS = 20


def add_commands(subparsers: Any) -> None:
    """Adds `train` with its three commands to the command line's subparsers; each sets `run`."""
    summary = "Train a draft: let the target write answers, fit, measure."
    train = subparsers.add_parser("train", help=summary, description=summary)
    add_train_commands(train.add_subparsers(dest="train_command", required=True, metavar="COMMAND"))


def add_train_commands(commands: Any) -> None:
    """Adds `collect`, `fit` and `eval` to some subparsers."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", required=True, help="folder, hub id, demo, or demo:FOLDER")
    shared.add_argument("--dtype", choices=DTYPES, default="auto", help="of the model; auto: as published")
    shared.add_argument("--device", default="auto", help="auto: a GPU where there is one")
    shared.add_argument("--quiet", action="store_true", help="show no progress")
    shared.add_argument("--traceback", action="store_true", help="show where an error came from")
    asked = argparse.ArgumentParser(add_help=False)
    asked.add_argument("--source", required=True, help="JSONL file, folder of pictures, or hub data set")
    asked.add_argument("--split", default="train", help="of a hub data set")
    asked.add_argument("--image-root", help="where a JSONL file's picture paths start (its own folder)")
    asked.add_argument("--extension", default=EXTENSION, help='put behind every prompt; "" for none')
    asked.add_argument("--limit", type=int, metavar="N", help="only the first N requests")
    for name, declare, run, parents in (
        ("collect", _collect_arguments, _collect, [shared, asked]),
        ("fit", _fit_arguments, _fit, [shared]),
        ("eval", _eval_arguments, _evaluate, [shared, asked]),
    ):
        summary = (run.__doc__ or "").splitlines()[0]
        parser = commands.add_parser(name, parents=parents, help=summary, description=summary)
        declare(parser)
        parser.set_defaults(run=run)


def _collect_arguments(parser: argparse.ArgumentParser) -> None:
    default = CollectConfig()
    parser.add_argument("--out", required=True, help="folder of the data set; an unfinished one is continued")
    parser.add_argument("--draft", help="an earlier draft, which makes it faster")
    parser.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, metavar="N")
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=list(default.temperatures),
        metavar="T",
        help="an answer at each; 0 (the default) is greedy",
    )
    parser.add_argument("--top-p", type=float, default=default.top_p, metavar="P")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--read", action="store_true", help="take the source's own answers instead of writing any")
    parser.add_argument(
        "--max-repeated",
        type=float,
        default=default.max_repeated,
        metavar="SHARE",
        help="skip answers of which a larger share of 4-grams occurred before; 1 (the default) keeps them",
    )
    parser.add_argument("--drop-cut", action="store_true", help="skip answers that reach the limit")
    parser.add_argument("--shortest-answer", type=int, default=default.shortest_answer, metavar="N")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, metavar="N")
    parser.add_argument("--shard-size", type=int, default=default.shard_size, metavar="N")


def _fit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="YAML or JSON file; the options below override it")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    for field in fields(FitConfig):
        option = "--" + field.name.replace("_", "-")
        kind = str(field.type).removesuffix(" | None")
        if field.name == "data":
            parser.add_argument(option, nargs="+", metavar="FOLDER")
        elif kind == "bool":
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(option, type={"str": str, "int": int, "float": float}[kind])


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft", required=True, help="folder, hub id, prompt-lookup or oracle")
    parser.add_argument("--out", help="JSON file; default: standard output")
    parser.add_argument("--plot", metavar="PNG", help="also draw the figures (needs matplotlib)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], metavar="T")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument(
        "--max-repeated",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="leave out answers of which a larger share of 4-grams occurred before; 1 (the default) leaves out none",
    )
    parser.add_argument("--shortest-answer", type=int, default=1, metavar="N", help="leave out answers of fewer tokens")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("depth", "top_k", "total_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="of the draft tree")


def _console(arguments: argparse.Namespace) -> Console | None:
    return None if arguments.quiet else Console(stderr=True)


def _load(arguments: argparse.Namespace, draft: str = "", device: str | None = None) -> Any:
    # Here, because the command line imports this module.
    from vispec.cli.loading import load

    return load(arguments.model, draft, dtype=arguments.dtype, device=device or arguments.device, quiet=arguments.quiet)


def _collect(arguments: argparse.Namespace) -> int:
    """Let the target write answers to prompts about pictures."""
    names = [field.name for field in fields(CollectConfig) if field.name != "keep_cut"]
    given = {name: getattr(arguments, name) for name in names}
    given["temperatures"] = tuple(given["temperatures"])
    config = CollectConfig(**given, keep_cut=not arguments.drop_cut)
    source = open_source(arguments.source, image_root=arguments.image_root, split=arguments.split)
    loaded = _load(arguments, arguments.draft or "")
    totals = collect(
        loaded.model,
        loaded.processor,
        source,
        arguments.out,
        config,
        draft=loaded.draft,
        limit=arguments.limit,
        console=_console(arguments),
    )
    if totals["skipped"]:
        skips = read_dataset(arguments.out)[1]
        for skip in skips[:LISTED_SKIPS]:
            print(f"skipped ({skip.skipped}): {skip.name}: {skip.detail}", file=sys.stderr)
        if len(skips) > LISTED_SKIPS:
            print(f"and {len(skips) - LISTED_SKIPS} more, in the shards of {arguments.out}", file=sys.stderr)
    print(json.dumps(totals))
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    """Train a draft on the answers of its target."""
    given = {field.name: getattr(arguments, field.name) for field in fields(FitConfig)}
    config = read_config(arguments.config, {name: value for name, value in given.items() if value is not None})
    # Before minutes of loading.
    for folder in config.data:
        read_manifest(folder)
    processes = Processes()
    loaded = _load(arguments, device=None if processes.device is None else str(processes.device))
    report = fit(
        loaded.model,
        loaded.processor,
        config,
        resume=arguments.resume,
        console=_console(arguments),
        processes=processes,
    )
    if processes.first:
        last = report.losses[-1] if report.losses else None
        print(json.dumps({"out": config.out, "steps": report.steps, "loss": last, "skipped": report.skipped}))
    processes.close()
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    """Measure how many of a draft's tokens the target accepts on held-out prompts."""
    from vispec.tree import TreeConfig

    sizes = {name: getattr(arguments, name) for name in ("depth", "top_k", "total_tokens")}
    if arguments.plot:
        # Before minutes of generation.
        check_plotting()
    tree = TreeConfig(**{name: size for name, size in sizes.items() if size is not None})
    source = open_source(arguments.source, image_root=arguments.image_root, split=arguments.split)
    loaded = _load(arguments, arguments.draft)
    found = evaluate(
        loaded.model,
        loaded.processor,
        loaded.draft,
        source,
        temperatures=arguments.temperatures,
        max_new_tokens=arguments.max_new_tokens,
        extension=arguments.extension,
        tree=tree,
        limit=arguments.limit,
        max_repeated=arguments.max_repeated,
        shortest_answer=arguments.shortest_answer,
        seed=arguments.seed,
        console=_console(arguments),
    )
    if arguments.plot:
        plot_figures(found, Path(arguments.plot))
    text = json.dumps({"model": arguments.model, "draft": arguments.draft, **found}, indent=1) + "\n"
    if arguments.out:
        write_atomically(Path(arguments.out), text)
    else:
        print(text, end="")
    return 0
