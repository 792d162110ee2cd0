"""Trains a draft on its target's own answers; the target is read anew in every step and never changed."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import vispec
from vispec.drafts import MedusaDraft, ViSpecDraft
from vispec.drafts.head import DraftHead
from vispec.targets import Target, load_target
from vispec.train.cache import FeatureCache
from vispec.train.chains import chain_passes
from vispec.train.checkpoint import (
    balance,
    export_published,
    finished_draft,
    load_checkpoint,
    save_checkpoint,
    starting_draft,
)
from vispec.train.collect import target_description
from vispec.train.config import FitConfig
from vispec.train.data import Sample, dataset_totals
from vispec.train.feed import Feed
from vispec.train.log import TrainingLog
from vispec.train.losses import PARTS, summed_loss
from vispec.train.processes import Processes
from vispec.train.rows import medusa_passes, supervised_rows, whole_passes

BETAS = (0.9, 0.95)
LISTED_SKIPS = 20
PASSES = {"whole": whole_passes, "chains": chain_passes, "medusa": medusa_passes}
# Parts of the draft that text alone does not train.
PICTURE_PARTS = ("imadpt.", "img_fc.")


@dataclass
class FitReport:
    """What a run did.

    Attributes:
        draft: the trained draft in the target's dtype.
        losses: the mean loss a supervised row of every step of this call, summed over passes.
        steps: the step it ended with.
        skipped: samples left out or cut, by reason.
    """

    draft: ViSpecDraft | MedusaDraft
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


def fit(
    model: Any,
    processor: Any,
    config: FitConfig,
    *,
    resume: bool = False,
    console: Console | None = None,
    processes: Processes | None = None,
) -> FitReport:
    """Runs one stage of training and writes the draft to `config.out`.

    Args:
        resume: go on from the newest checkpoint in `config.out`, to the same numbers as without the break.
        console: where progress is shown; None: nowhere.
        processes: several of them, each with a model of its own; default: as launched.

    Raises:
        ValueError: nothing to supervise, a target that did not write the answers, a folder that is in use.
        FloatingPointError: a loss that is not finite, with step and samples.
        OSError: a full disk.
    Notes: with one thread and the same number of processes a resumed run is bit for bit the unbroken one.
    Source: ViSpec (arXiv 2509.15235), section 3.4; EAGLE (arXiv 2401.15077) for stage 1.
    """
    processes = Processes() if processes is None else processes
    return _Trainer(load_target(model), processor, config, processes).run(resume, console)


class _Trainer:
    def __init__(self, target: Target, processor: Any, config: FitConfig, processes: Processes) -> None:
        self.target = target
        self.processor = processor
        self.config = config
        self.processes = processes
        self.out = Path(config.out)
        self.feed = Feed(target, processor, config, self._cache())
        self.draft = starting_draft(config, target, self.feed.token_counts)
        if config.balanced:
            balance(self.draft, *self.feed.sizes(), config.seed)
        self.head = DraftHead(target.head, self.draft.head_tokens)
        named = self.draft.named_parameters()
        trained = [p for name, p in named if config.stage == 2 or not name.startswith(PICTURE_PARTS)]
        self.draft.requires_grad_(False)
        self.parameters = [parameter.requires_grad_(True) for parameter in trained]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.peak_learning_rate, betas=BETAS, weight_decay=config.weight_decay
        )

    def _cache(self) -> FeatureCache | None:
        config = self.config
        if not config.feature_cache_gb:
            return None
        return FeatureCache(
            Path(config.feature_cache or self.out / "features"),
            int(config.feature_cache_gb * 1e9),
            self.target,
            inside_pictures=config.inside_pictures,
            longest=config.max_length,
            shares=self.processes.count,
        )

    def run(self, resume: bool, console: Console | None) -> FitReport:
        first = self.processes.first
        console = console if first else None
        start = 0
        if resume:
            start = load_checkpoint(self.out, self.draft, self.optimizer, self.config.as_dict())
        elif (self.out / "log.csv").exists():
            raise ValueError(
                f"fit: out must be a new folder, got {self.out}, which holds a run: resume it, or delete it"
            )
        self.processes.wait()
        self.out.mkdir(parents=True, exist_ok=True)
        self.feed.check_target_loss()
        log = TrainingLog(self.out, start, console) if first else None
        report = FitReport(self.draft)
        try:
            self._say(log)
            for number in range(start + 1, self.feed.steps + 1):
                row = self._step(number)
                report.losses.append(row["loss"])
                self._say(log)
                if log is not None and (number % self.config.log_every == 0 or number == self.feed.steps):
                    log.add(row)
                if number % self.config.checkpoint_every == 0 or number == self.feed.steps:
                    self._checkpoint(number)
        finally:
            if log is not None:
                log.close()
        report.draft = finished_draft(self.draft, self.target.dtype)
        report.steps = max(start, self.feed.steps)
        report.skipped = dict(+self.feed.skipped)
        if first:
            self._save(report)
        self.processes.wait()
        return report

    def _say(self, log: TrainingLog | None) -> None:
        if log is None:
            return
        lines = self.feed.new_skips()
        for line in lines[:LISTED_SKIPS]:
            log.say(line)
        if len(lines) > LISTED_SKIPS:
            log.say(f"and {len(lines) - LISTED_SKIPS} more")

    def _learning_rate(self, number: int) -> float:
        warmup = min(round(self.config.warmup_epochs * self.feed.steps_per_epoch), self.feed.steps)
        peak = self.config.peak_learning_rate
        if number <= warmup:
            return peak * number / warmup
        return peak * (self.feed.steps - number + 1) / (self.feed.steps - warmup)

    def _step(self, number: int) -> dict[str, Any]:
        started = time.perf_counter()
        chosen = self.feed.chosen(number)
        own = sorted(chosen[self.processes.rank :: self.processes.count], key=lambda sample: sample.length)
        # Loss and its parts; rows, tokens, samples that were skipped, and the seconds that the target took.
        sums = torch.zeros(len(PARTS) + 4, dtype=torch.float64)
        size = self.config.micro_batch_size
        for place in range(0, len(own), size):
            sums += self._micro_batch(own[place : place + size], number)
        sums = self.processes.sum(sums.to(self.target.device, torch.float32)).tolist()
        rows, tokens, skipped, target_seconds = sums[len(PARTS) :]
        names = [sample.name for sample in chosen]
        if not rows:
            raise ValueError(f"fit: step {number} supervises nothing: all of its samples were skipped: {names}")
        rate = self._learning_rate(number)
        norm = self._gradient(rows)
        if not all(map(math.isfinite, (sums[0], norm))):
            raise FloatingPointError(
                f"fit: loss and gradient must be finite, got {sums[0] / rows} and {norm} in step {number} "
                f"(learning rate {rate:.3g}, samples {names}): lower the learning rate, or look at these samples"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        return {
            "step": number,
            "epoch": (number - 1) // self.feed.steps_per_epoch + 1,
            **self._parts(sums, rows),
            "learning_rate": rate,
            "gradient_norm": norm,
            "rows": int(rows),
            "tokens": int(tokens),
            "skipped": int(skipped),
            "seconds": seconds,
            "target_share": target_seconds / seconds / self.processes.count,
        }

    def _micro_batch(self, samples: list[Sample], number: int) -> Tensor:
        """Adds a micro-batch's gradients. Returns the summands of a step, [len(PARTS) + 4] float64."""
        config = self.config
        readings, kept, target_seconds = self.feed.read(samples)
        skipped = len(samples) - len(kept)
        if not kept:
            return torch.tensor([0.0] * (len(PARTS) + 2) + [skipped, 0.0], dtype=torch.float64)
        lengths = [reading.length for reading in readings]
        with torch.autocast(self.target.device.type, torch.bfloat16, enabled=config.bf16):
            said = PASSES[config.kind if config.kind == "medusa" else config.rollout](
                self.draft,
                readings,
                [supervised_rows(sample, config.max_length) for sample in kept],
                passes=config.passes_of(number, self.feed.steps),
                noises=self.feed.noises(kept, lengths, number),
                checkpointed=config.gradient_checkpointing,
            )
        loss, parts = summed_loss(
            config.loss_weights,
            said.predicted,
            said.wanted,
            self.head,
            counted=said.counted,
            chunk=config.loss_chunk,
        )
        loss.backward()
        counts = [len(said.wanted), sum(lengths), skipped, target_seconds]
        return torch.cat([parts.double().cpu(), torch.tensor(counts, dtype=torch.float64)])

    def _parts(self, sums: list[float], rows: float) -> dict[str, float | None]:
        """The loss and its parts a row; None for those that were not computed."""
        weights = asdict(self.config.loss_weights)
        found = {name: value / rows for name, value in zip(PARTS, sums, strict=False)}
        return {name: value if weights.get(name, 1) or name == "feature" else None for name, value in found.items()}

    def _gradient(self, rows: float) -> float:
        """Makes sums over rows into the mean over all processes' rows, clipped. Returns the norm before clipping."""
        for parameter in self.parameters:
            if parameter.grad is None:
                # Text has no gradient for the adaptor; every process must sum, and AdamW must see, the same thing.
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.processes.sum(parameter.grad).div_(rows)
        norm = torch.stack([parameter.grad.norm() for parameter in self.parameters]).norm()
        torch.nn.utils.clip_grad_value_(self.parameters, self.config.clip_value)
        return float(norm)

    def _vocabulary(self) -> dict[str, Any]:
        """What the draft may propose, and which share of the answers' tokens that is."""
        counts, tokens = self.feed.token_counts, self.draft.head_tokens.cpu()
        held = counts[tokens] if tokens.numel() else counts
        return {"tokens": held.numel(), "share_of_answers": float(held.sum() / counts.sum())}

    def _checkpoint(self, number: int) -> None:
        if self.processes.first:
            config = self.config.as_dict()
            save_checkpoint(self.out, number, self.draft, self.optimizer, config, self.config.keep_checkpoints)
        self.processes.wait()

    def _save(self, report: FitReport) -> None:
        report.draft.save_pretrained(self.out)
        if self.config.export:
            export_published(report.draft, self.target, self.out / "published")
        more = {
            "vispec": vispec.__version__,
            "target": target_description(self.target),
            "dataset": dataset_totals(*self.feed.manifests),
            "vocabulary": self._vocabulary(),
            "steps": report.steps,
            "processes": self.processes.count,
            "last_loss": report.losses[-1] if report.losses else None,
            "skipped": report.skipped,
        }
        self.config.save(self.out, more)
