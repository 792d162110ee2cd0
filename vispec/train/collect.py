"""The target writes the answers that its draft will learn from."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from torch import Tensor

from vispec.decode import fast_generate
from vispec.decode.round import RoundEvent
from vispec.drafts import Draft
from vispec.targets import Target, load_target, resolve_settings
from vispec.train.data import DatasetWriter, Sample, Skip, dataset_totals
from vispec.train.inputs import check_placeholders, extended, merge_inputs, process, prompt_text
from vispec.train.log import collect_progress
from vispec.train.sources import ImageStore, Request, Source, UnusableSample

EXTENSION = "Please answer with at least 1000 words."
# A row is trained on the token after the answer's first, so a shorter answer teaches nothing.
SHORTEST_ANSWER = 3


@dataclass(frozen=True)
class CollectConfig:
    """How answers are written; everything but the two sizes of work is fixed for one data set.

    Attributes:
        extension: put behind the last user turn, so that answers are long; "" leaves prompts as they are.
        max_new_tokens: an answer that reaches it is cut, and counted.
        temperature: 0 is greedy.
        top_p: of sampling.
        seed: sample i is drawn with seed + i, so batches and resumption change nothing.
        keep_cut: whether cut answers are kept.
        shortest_answer: answers of fewer tokens are skipped.
        batch_size: prompts generated together.
        shard_size: requests a shard, which is what a killed run loses at most.
    """

    extension: str = EXTENSION
    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    keep_cut: bool = True
    shortest_answer: int = SHORTEST_ANSWER
    batch_size: int = 4
    shard_size: int = 64

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 2), ("shortest_answer", 2), ("batch_size", 1), ("shard_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"collect: {name} must be at least {least}, got {getattr(self, name)}")
        if self.temperature < 0:
            raise ValueError(f"collect: temperature must be at least 0, got {self.temperature}")

    def options(self) -> dict[str, Any]:
        """Generation options for `fast_generate`."""
        if not self.temperature:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": self.top_p}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


class Prepared(NamedTuple):
    """A request as the model takes it, batch 1."""

    index: int
    request: Request
    text: str
    inputs: dict[str, Tensor]


def prepare(
    index: int, request: Request, processor: Any, store: ImageStore, target: Target, extension: str, new_tokens: int
) -> Prepared:
    """Turns a request into the model's inputs.

    Raises: UnusableSample for a missing or unreadable picture, a prompt without its placeholders, and one that
    leaves no room for `new_tokens`.
    """
    text = prompt_text(processor, extended(request.messages, extension))
    inputs = process(processor, text, [store.open(image) for image in request.images])
    check_placeholders(inputs["input_ids"], target.placeholder_tokens, len(request.images))
    length = inputs["input_ids"].shape[1]
    if target.max_positions is not None and length + new_tokens > target.max_positions:
        raise UnusableSample("too long", f"{length} prompt tokens + {new_tokens} > {target.max_positions} positions")
    return Prepared(index, request, text, inputs)


def collect(
    model: Any,
    processor: Any,
    source: Source,
    folder: str | Path,
    config: CollectConfig | None = None,
    *,
    draft: Draft | None = None,
    limit: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Lets the target answer a source's requests and stores tokens and picture references.

    A run that ended early goes on where its last whole shard ended. `draft` (an earlier one) only makes it faster.

    Args:
        source: from `open_source`.
        limit: stop after so many requests of the source; a later run may go further.
        console: where progress is shown; None: nowhere.

    Returns: totals of the whole data set: samples, answer_tokens, cut_answers, and skips by reason.
    Raises:
        ValueError: a folder that was collected with other settings, or a source without one usable request.
        OSError: a full disk; what was finished is whole.
    """
    config = CollectConfig() if config is None else config
    target = load_target(model)
    writer = DatasetWriter(folder, _settings(target, source, config))
    store = ImageStore(source.image_root)
    last = len(source) if limit is None else min(limit, len(source))
    done = writer.next_index
    with collect_progress(console, done, last) as progress:
        started, tokens = time.perf_counter(), 0
        while writer.next_index < last:
            first = writer.next_index
            stop = min(first + config.shard_size, last)
            samples, skips = _shard(range(first, stop), target, processor, source, store, config, draft)
            writer.append(samples, skips, stop)
            tokens += sum(len(sample.answer) for sample in samples)
            progress(stop, tokens / (time.perf_counter() - started), dataset_totals(writer.manifest))
    totals = dataset_totals(writer.manifest)
    if not totals["samples"]:
        raise ValueError(
            f"collect: at least one request must be usable, got none of {writer.next_index}: {totals['skipped']}"
        )
    return totals


def _settings(target: Target, source: Source, config: CollectConfig) -> dict[str, Any]:
    settings = asdict(config)
    del settings["batch_size"], settings["shard_size"]
    return {
        **settings,
        "source": source.description,
        "image_root": str(source.image_root),
        "target": target_description(target),
    }


def target_description(target: Target) -> dict[str, Any]:
    """What a data set says of the model that wrote it."""
    return {
        "architecture": type(target.model).__name__,
        "hidden_size": target.hidden_size,
        "layers": target.text_config.num_hidden_layers,
        "vocabulary": target.vocabulary,
    }


def _shard(
    indices: range,
    target: Target,
    processor: Any,
    source: Source,
    store: ImageStore,
    config: CollectConfig,
    draft: Draft | None,
) -> tuple[list[Sample], list[Skip]]:
    prepared: list[Prepared] = []
    samples: list[Sample] = []
    skips: list[Skip] = []
    names = {index: f"row {index}" for index in indices}
    for index in indices:
        try:
            request = source[index]
            names[index] = request.name
            prepared.append(prepare(index, request, processor, store, target, config.extension, config.max_new_tokens))
        except UnusableSample as error:
            skips.append(Skip(index, names[index], error.reason, error.detail))
    # Prompts of like length together need the least padding.
    prepared.sort(key=lambda one: (one.inputs["input_ids"].shape[1], one.index))
    for first in range(0, len(prepared), config.batch_size):
        batch = prepared[first : first + config.batch_size]
        for one, (answer, ended) in zip(batch, _answers(target, draft, batch, config), strict=True):
            try:
                _check_answer(answer, ended, target, config)
            except UnusableSample as error:
                skips.append(Skip(one.index, one.request.name, error.reason, error.detail))
                continue
            prompt = tuple(one.inputs["input_ids"][0].tolist())
            request = one.request
            samples.append(
                Sample(one.index, request.name, request.images, one.text, prompt, answer, ended, request.kind)
            )
    return samples, skips


def _answers(
    target: Target, draft: Draft | None, batch: Sequence[Prepared], config: CollectConfig
) -> list[tuple[tuple[int, ...], bool]]:
    """The new tokens of each row, and whether it ended by itself."""
    inputs: Mapping[str, Tensor] = merge_inputs([one.inputs for one in batch])
    emitted: list[list[int]] = [[] for _ in batch]

    def keep(event: RoundEvent) -> None:
        for row, tokens in zip(emitted, event.emitted, strict=True):
            row.extend(tokens)

    seeds = [config.seed + one.index for one in batch]
    fast_generate(target, draft, inputs, seed=seeds, on_round=keep, **config.options())
    ends = resolve_settings(target.model, inputs["input_ids"], config.options()).eos_token_ids
    return [(tuple(row), row[-1] in ends) for row in emitted]


def _check_answer(answer: tuple[int, ...], ended: bool, target: Target, config: CollectConfig) -> None:
    if len(answer) < config.shortest_answer:
        raise UnusableSample("short answer", f"{len(answer)} tokens")
    if not ended and not config.keep_cut:
        raise UnusableSample("cut answer", f"{len(answer)} tokens without an end")
    if set(answer) & set(target.placeholder_tokens):
        raise UnusableSample("placeholder in answer", "the answer holds a picture's placeholder token")
