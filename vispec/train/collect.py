"""The target writes the answers that its draft will learn from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
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
from vispec.train.loops import breaking_off, looped, repeated
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
        temperatures: each request is answered once at each; 0 is greedy.
        top_p: of sampling.
        seed: sample i is drawn with seed + i, so batches and resumption change nothing.
        read: the source's own answers are taken, and the target only reads them while a draft is fitted.
        keep_cut: whether cut answers are kept.
        max_repeated: an answer loops where a larger share of its 4-grams, or of those of its last 32 tokens, occurred
            before; it is broken off and skipped. 1: none does.
        shortest_answer: answers of fewer tokens are skipped.
        batch_size: prompts generated together.
        shard_size: requests a shard, which is what a killed run loses at most.
    """

    extension: str = EXTENSION
    max_new_tokens: int = 1024
    temperatures: tuple[float, ...] = (0.0,)
    top_p: float = 1.0
    seed: int = 0
    read: bool = False
    keep_cut: bool = True
    max_repeated: float = 1.0
    shortest_answer: int = SHORTEST_ANSWER
    batch_size: int = 4
    shard_size: int = 64

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 2), ("shortest_answer", 2), ("batch_size", 1), ("shard_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"collect: {name} must be at least {least}, got {getattr(self, name)}")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"collect: temperatures must be at least 0, got {list(self.temperatures)}")
        if not 0 < self.max_repeated <= 1:
            raise ValueError(f"collect: max_repeated must be above 0 and at most 1, got {self.max_repeated}")

    @property
    def answers(self) -> int:
        """Answers to each request."""
        return 1 if self.read else len(self.temperatures)

    def options(self, temperature: float) -> dict[str, Any]:
        """Generation options for `fast_generate`."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if temperature:
            found |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": self.top_p}
        return found


class Prepared(NamedTuple):
    """A request as the model takes it, batch 1."""

    index: int
    request: Request
    text: str
    inputs: dict[str, Tensor]
    temperature: float = 0.0


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
    last = config.answers * (len(source) if limit is None else min(limit, len(source)))
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
    settings = {**asdict(config), "temperatures": list(config.temperatures)}
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
    ready: dict[int, Prepared | Skip] = {}
    for index in indices:
        row, place = divmod(index, config.answers)
        if row not in ready:
            ready[row] = _prepared(row, target, processor, source, store, config)
        one = ready[row]
        if isinstance(one, Skip):
            skips.append(replace(one, index=index))
        else:
            prepared.append(one._replace(index=index, temperature=config.temperatures[place]))
    # Of one temperature, as a batch must be; and prompts of like length together need the least padding.
    prepared.sort(key=lambda one: (one.temperature, one.inputs["input_ids"].shape[1], one.index))
    for batch in _batches(prepared, config.batch_size):
        answers = _read(target, processor, batch, config) if config.read else _answers(target, draft, batch, config)
        for one, (answer, ended) in zip(batch, answers, strict=True):
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


def _prepared(
    row: int, target: Target, processor: Any, source: Source, store: ImageStore, config: CollectConfig
) -> Prepared | Skip:
    """One request of the source, or why it cannot be used."""
    name = f"row {row}"
    try:
        request = source[row]
        name = request.name
        if config.read and not request.answer:
            raise UnusableSample("no answer", f"{name} has none of answer, messages, conversations that end with one")
        return prepare(row, request, processor, store, target, config.extension, config.max_new_tokens)
    except UnusableSample as error:
        return Skip(row, name, error.reason, error.detail)


def _batches(prepared: Sequence[Prepared], size: int) -> Iterator[Sequence[Prepared]]:
    """Runs of at most `size` requests of one temperature."""
    for _, group in groupby(prepared, key=lambda one: one.temperature):
        rows = list(group)
        for first in range(0, len(rows), size):
            yield rows[first : first + size]


def _read(
    target: Target, processor: Any, batch: Sequence[Prepared], config: CollectConfig
) -> list[tuple[tuple[int, ...], bool]]:
    """The source's own answers as the target would have written them: their tokens, and an end token."""
    tokenizer = getattr(processor, "tokenizer", processor)
    ends = resolve_settings(target.model, batch[0].inputs["input_ids"], config.options(0.0)).eos_token_ids
    found = []
    for one in batch:
        tokens = tokenizer(one.request.answer, add_special_tokens=False)["input_ids"]
        whole = [*tokens, *ends[:1]][: config.max_new_tokens]
        found.append((tuple(whole), whole[-1] in ends))
    return found


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
    options = config.options(batch[0].temperature) | breaking_off(config.max_repeated, target.placeholder_tokens)
    fast_generate(target, draft, inputs, seed=seeds, on_round=keep, **options)
    ends = resolve_settings(target.model, inputs["input_ids"], options).eos_token_ids
    return [(tuple(row), row[-1] in ends) for row in emitted]


def _check_answer(answer: tuple[int, ...], ended: bool, target: Target, config: CollectConfig) -> None:
    if len(answer) < config.shortest_answer:
        raise UnusableSample("short answer", f"{len(answer)} tokens")
    if looped(answer, ended, config.max_new_tokens, config.max_repeated):
        raise UnusableSample("looping answer", f"{len(answer)} tokens, {repeated(answer):.2f} of its 4-grams repeated")
    if not ended and not config.keep_cut:
        raise UnusableSample("cut answer", f"{len(answer)} tokens without an end")
    if set(answer) & set(target.placeholder_tokens):
        raise UnusableSample("placeholder in answer", "the answer holds a picture's placeholder token")
