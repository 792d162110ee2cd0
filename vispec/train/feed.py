"""Which samples a training run sees, and when: order, inputs and skips."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vispec.targets import Target
from vispec.train.cache import FeatureCache
from vispec.train.collect import target_description
from vispec.train.config import FitConfig
from vispec.train.data import Sample, read_dataset, read_manifest
from vispec.train.inputs import sample_inputs
from vispec.train.rows import Reading, feature_noise, read_target, supervised_rows
from vispec.train.sources import ImageStore, UnusableSample

# Samples whose loss under the target is looked at before training.
CHECKED_SAMPLES = 4


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers; near numbers give unrelated seeds."""
    return random.Random("-".join(map(str, numbers))).getrandbits(63)


def count_tokens(samples: list[Sample], vocabulary: int) -> Tensor:
    """How often each token occurs in the answers, [V] int64."""
    return torch.bincount(torch.tensor([token for one in samples for token in one.answer]), minlength=vocabulary)


class Feed:
    """The usable samples of some data sets in a fixed random order.

    Everything random follows from the config's seed, the epoch and the sample, so a step is the same whatever ran
    before it and however many processes share it.

    Attributes:
        samples: those that can be trained on.
        token_counts: [V] int64, how often each token occurs in the data sets' answers.
        skipped: samples left out or cut, by reason.
        steps: optimizer steps of the whole run.

    Raises: ValueError for answers of another model, and where no sample has a row to train.
    """

    def __init__(self, target: Target, processor: Any, config: FitConfig, cache: FeatureCache | None = None) -> None:
        self.target = target
        self.processor = processor
        self.config = config
        self.cache = cache
        self._told_of_disk = False
        self.manifests = [read_manifest(folder) for folder in config.data]
        own = target_description(target)
        for manifest in self.manifests:
            known = manifest["settings"].get("target")
            if known != own:
                raise ValueError(f"fit: model must be the one that wrote the answers, {known}, got {own}")
        roots = [config.image_root or manifest["settings"]["image_root"] for manifest in self.manifests]
        self._stores = [ImageStore(root) for root in roots]
        # The store of each sample by its index, which is made anew to be the data sets' together.
        self._store_of: list[ImageStore] = []
        self.skipped: Counter[str] = Counter()
        self._lines: list[str] = []
        self._unreadable: set[int] = set()
        samples = self._all_samples()
        # Of all answers, so that a picture that is gone changes no vocabulary.
        self.token_counts = count_tokens(samples, target.vocabulary)
        self.samples = self._usable(samples)
        self.steps_per_epoch = math.ceil(len(self.samples) / config.batch_size)
        total = config.epochs * self.steps_per_epoch
        self.steps = total if config.max_steps is None else min(total, config.max_steps)

    def _all_samples(self) -> list[Sample]:
        samples: list[Sample] = []
        for folder, store in zip(self.config.data, self._stores, strict=True):
            for sample in read_dataset(folder)[0]:
                samples.append(replace(sample, index=len(samples)))
                self._store_of.append(store)
        return samples

    def chosen(self, number: int) -> list[Sample]:
        """The samples of step `number`, which counts from 1."""
        epoch, place = divmod(number - 1, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(_mixed(self.config.seed, epoch))
        order = torch.randperm(len(self.samples), generator=generator)
        size = self.config.batch_size
        return [self.samples[index] for index in order[place * size : (place + 1) * size].tolist()]

    def read(self, samples: list[Sample]) -> tuple[list[Reading], list[Sample], float]:
        """What the target makes of those samples whose pictures can be read, those samples, and its seconds.

        The target reads one sample at a time: its features then depend on nothing else in the batch, and there is
        no padding to read.
        """
        found, kept, seconds = [], [], 0.0
        for sample in samples:
            try:
                reading, own_seconds = self._reading(sample)
            except UnusableSample as error:
                if sample.index not in self._unreadable:
                    self._unreadable.add(sample.index)
                    self._skip(error.reason, f"{sample.name}: {error.detail}")
                continue
            found.append(reading)
            kept.append(sample)
            seconds += own_seconds
        return found, kept, seconds

    def _reading(self, sample: Sample) -> tuple[Reading, float]:
        known = None if self.cache is None else self.cache.get(sample)
        if known is not None:
            return known, 0.0
        inputs = sample_inputs(self.processor, self._store_of[sample.index], sample, self.config.max_length)
        started = time.perf_counter()
        (reading,) = read_target(self.target, inputs)
        if reading.features.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if self.cache is not None:
            self.cache.put(sample, inputs["input_ids"][0].to(self.target.device), reading)
            if self.cache.full_disk and not self._told_of_disk:
                self._told_of_disk = True
                self._lines.append(f"disk is full: no more features are kept in {self.cache.folder}")
        return reading, seconds

    def new_skips(self) -> list[str]:
        """A line for each sample skipped since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def noises(self, samples: list[Sample], lengths: list[int], number: int) -> list[Tensor] | None:
        """Noise [S_b, C] on each sample's features in step `number`, None where the config wants none."""
        if not self.config.noise:
            return None
        epoch, width = (number - 1) // self.steps_per_epoch, self.target.hidden_size
        pairs = zip(samples, lengths, strict=True)
        return [feature_noise(length, width, _mixed(self.config.seed, epoch, one.index)) for one, length in pairs]

    def sizes(self) -> tuple[float, float]:
        """Root-mean-square of the target's features behind the prompt, and of its embeddings."""
        read = [(sample, one) for sample in self.samples[:CHECKED_SAMPLES] for one in self.read([sample])[0]]
        if not read:
            raise ValueError(f"fit: one of the first {CHECKED_SAMPLES} samples must have pictures that can be read")
        features = torch.cat([one.features[len(sample.prompt) :] for sample, one in read]).float()
        table = self.target.embedding.weight.detach().float()
        return float(features.square().mean().sqrt()), float(table.square().mean().sqrt())

    def check_target_loss(self) -> None:
        """Raises ValueError where the target would hardly have written these answers: wrong weights."""
        limit = self.config.max_target_loss
        limit = math.log(self.target.vocabulary) / 2 if limit is None else limit
        sums, count = 0.0, 0
        for sample in self.samples[:CHECKED_SAMPLES]:
            for reading in self.read([sample])[0]:
                start, stop = len(sample.prompt), reading.length
                tokens = torch.tensor(sample.answer[: stop - start], device=self.target.device)
                with torch.no_grad():
                    for place in range(start, stop, self.config.loss_chunk):
                        end = min(place + self.config.loss_chunk, stop)
                        logits = self.target.head(reading.features[place - 1 : end - 1]).float()
                        sums += float(F.cross_entropy(logits, tokens[place - start : end - start], reduction="sum"))
                count += stop - start
        if count and not sums / count <= limit:
            raise ValueError(
                f"fit: the target's loss on its own answers must be at most {limit:.2f} nats a token, got "
                f"{sums / count:.2f}: these are not the weights that wrote {', '.join(self.config.data)}"
            )

    def _usable(self, samples: list[Sample]) -> list[Sample]:
        """The samples that can be trained on; counts and lists the others."""
        kept = []
        for sample in samples:
            store = self._store_of[sample.index]
            gone = [image for image in sample.images if store.missing(image)]
            if gone:
                self._skip("image missing", f"{sample.name}: {store.root / gone[0]}")
            elif not supervised_rows(sample, self.config.max_length):
                self._skip("nothing to supervise", f"{sample.name}: {sample.length} tokens")
            else:
                self.skipped["answer cut at max_length"] += sample.length > self.config.max_length
                kept.append(sample)
        if not kept:
            raise ValueError(
                f"fit: nothing is supervised: none of {len(samples)} samples of {', '.join(self.config.data)} has a "
                f"row to train, {dict(+self.skipped)}"
            )
        return kept

    def _skip(self, reason: str, line: str) -> None:
        self.skipped[reason] += 1
        self._lines.append(f"skipped ({reason}): {line}")
