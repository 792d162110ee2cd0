"""What collecting and fitting cost beside the target's own work, for one model and some prompts.

Collecting and plain batched `generate` write the same greedy answers in turn; a step of stage 2 with its published
settings is timed as a whole and for the target's pass in it; peak memory is that of processes of their own, which load
the model and then answer one prompt plainly, or fit a draft on that prompt and answer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.record import RESULTS, peak_resident_bytes
from benchmarks.training.runs import read_log
from vispec.cli.loading import Loaded, load
from vispec.train.collect import CollectConfig, collect
from vispec.train.config import FitConfig
from vispec.train.data import dataset_totals, read_dataset, read_manifest
from vispec.train.fit import fit
from vispec.train.inputs import prompt_text
from vispec.train.sources import ImageStore, Request, Source, open_source

RECORD = RESULTS / "training_costs.json"
STEPS = 3
WAYS = ("plain", "fit")


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command line; all requests must have as many pictures."""
    parser.add_argument("--model", required=True, help="folder, hub id, demo, or demo:FOLDER")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--source", required=True, help="JSONL file or folder of pictures")
    parser.add_argument("--image-root")
    parser.add_argument("--requests", type=int, default=16, metavar="N")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures. Raises: ValueError where collecting did not write what `generate` says."""
    loaded = load(options.model, "", dtype=options.dtype)
    source = open_source(options.source, image_root=options.image_root)
    row = {name: getattr(options, name) for name in ("model", "requests", "batch_size", "max_new_tokens", "repeats")}
    row["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
    with TemporaryDirectory() as folder:
        row |= _collecting(loaded, source, options, Path(folder))
        row |= _step(loaded, Path(folder))
        del loaded
        row |= _memory(options, Path(folder))
    return row


def _collecting(loaded: Loaded, source: Source, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = CollectConfig(
        extension="",
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        shard_size=options.requests,
    )
    store = ImageStore(source.image_root)
    seconds: dict[str, list[float]] = {"collect": [], "generate": []}
    plain: dict[int, list[int]] = {}
    for turn in range(options.repeats):
        started = time.perf_counter()
        collect(loaded.model, loaded.processor, source, folder / f"answers{turn}", config, limit=options.requests)
        seconds["collect"].append(time.perf_counter() - started)
        started = time.perf_counter()
        for first in range(0, options.requests, options.batch_size):
            batch = range(first, min(first + options.batch_size, options.requests))
            answers = _plainly(loaded, [source[index] for index in batch], store, options.max_new_tokens)
            plain |= dict(zip(batch, answers, strict=True))
        seconds["generate"].append(time.perf_counter() - started)
    samples, skips = read_dataset(folder / "answers0")
    same = sum(plain[one.index][: len(one.answer)] == list(one.answer) for one in samples)
    if loaded.model.dtype == torch.float32 and same < len(samples):
        raise ValueError(f"training costs: collect must write what generate says, got {same} of {len(samples)} alike")
    ratios = sorted(ours / theirs for ours, theirs in zip(seconds["generate"], seconds["collect"], strict=True))
    return {
        "answer_tokens": dataset_totals(read_manifest(folder / "answers0"))["answer_tokens"],
        "skipped": len(skips),
        "alike": f"{same} of {len(samples)}",
        "collect_seconds": seconds["collect"],
        "generate_seconds": seconds["generate"],
        "collect_over_generate": ratios[len(ratios) // 2],
    }


def _plainly(loaded: Loaded, requests: list[Request], store: ImageStore, new_tokens: int) -> list[list[int]]:
    """The new tokens of `generate` for a batch that the processor made."""
    loaded.tokenizer.padding_side = "left"
    text = [prompt_text(loaded.processor, request.messages) for request in requests]
    pictures = [[store.open(image) for image in request.images] for request in requests]
    inputs = loaded.processor(text=text, images=pictures, padding=True, return_tensors="pt").to(loaded.model.device)
    answers = loaded.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return answers[:, inputs["input_ids"].shape[1] :].tolist()


def _step(loaded: Loaded, folder: Path) -> dict[str, Any]:
    config = FitConfig(data=str(folder / "answers0"), out=str(folder / "share"), max_steps=STEPS, log_every=1)
    fit(loaded.model, loaded.processor, config)
    # The first one warms up.
    shares = [float(step["target_share"]) for step in read_log(folder / "share")[1:]]
    return {"target_share_of_a_step": sum(shares) / len(shares)}


def _memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    peaks = {}
    for way in WAYS:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_peak, args=(way, options, folder, theirs))
        child.start()
        child.join()
        if child.exitcode:
            raise RuntimeError(f"training costs: the process that measures {way} ended with {child.exitcode}")
        peaks[f"{way}_peak_bytes"] = mine.recv()
    return {**peaks, "fit_over_plain_memory": peaks["fit_peak_bytes"] / peaks["plain_peak_bytes"]}


def _peak(way: str, options: argparse.Namespace, folder: Path, found: Any) -> None:
    """Sends the peak memory in bytes of the GPU, or of this process where there is none."""
    loaded = load(options.model, "", dtype=options.dtype, quiet=True)
    source = open_source(options.source, image_root=options.image_root)
    if way == "plain":
        _plainly(loaded, [source[0]], ImageStore(source.image_root), options.max_new_tokens)
    else:
        config = CollectConfig(extension="", max_new_tokens=options.max_new_tokens)
        collect(loaded.model, loaded.processor, source, folder / "one", config, limit=1)
        one = FitConfig(data=str(folder / "one"), out=str(folder / "peak"), max_steps=STEPS, batch_size=1)
        fit(loaded.model, loaded.processor, one)
    found.send(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes())


def shown(record: dict[str, Any]) -> list[str]:
    """The table's lines."""
    (row,) = record["rows"]
    return [
        "| | |",
        "|---|---|",
        f"| collecting over plain batched `generate`, tokens a second | {row['collect_over_generate']:.2f}x |",
        f"| the target's share of a step's time in stage 2 | {row['target_share_of_a_step']:.0%} |",
        f"| peak memory of stage 2 over `generate` on as many tokens | {row['fit_over_plain_memory']:.2f}x |",
        "",
        f"{row['model']}, {row['dtype']}, {row['requests']} prompts in batches of {row['batch_size']}, "
        f"answers of at most {row['max_new_tokens']} tokens, median of {row['repeats']} turns; stage 2 as published, "
        "features not kept.",
    ]
