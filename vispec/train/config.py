"""What a training run is told: one dataclass, read from YAML or JSON, saved beside the weights."""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vispec.train.losses import STAGES, LossWeights
from vispec.tree import MAX_TOP_K

# Learning rates of the published runs.
LEARNING_RATES = {1: 3e-5, 2: 3e-6}
USED_CONFIG = "training.json"
KINDS = ("vispec", "medusa")
MEDUSA_HEADS = 4
ROLLOUTS = ("whole", "chains")
WEIGHTS = ("feature_weight", "cross_entropy_weight", "distance_weight", "ranking_weight")


@dataclass(frozen=True)
class FitConfig:
    """One stage of training. The defaults are the published ones where there are any.

    Attributes:
        data: folders of `vispec train collect`, whose samples are taken together.
        out: folder for weights, checkpoints, log and the used config.
        stage: 1 (features, soft cross-entropy; no picture weights) or 2 (probabilities, self-rollout, pictures).
        draft: folder or hub id to start from; None: fresh weights.
        kind: "vispec" (EAGLE's too), or "medusa": 1 + mtp_steps heads on the target's last feature, 4 by default.
        balanced: fresh weights start at the scale of the target's features and embeddings.
        num_queries: adaptor queries of fresh weights; 0: no adaptor, as EAGLE.
        global_feature: whether text behind a picture knows its global feature.
        picture_rows: False, with num_queries 0: nothing of a picture goes into the draft.
        head_size: the draft proposes only so many tokens, those that the answers hold most; None: the vocabulary of
            `draft`, or the whole one.
        mtp_steps: passes on the draft's own output after the first one; None: 0 in stage 1, 1 in stage 2.
        mtp_warmup: share of the steps over which the passes rise evenly from one to all.
        rollout: "whole": in later passes every row reads the draft's own output, as published; "chains": only as many
            rows as a chain of drafted tokens has, which is what a generation computes.
        feature_weight, cross_entropy_weight, distance_weight, ranking_weight: of the loss; None: the stage's own.
        epochs: times every sample is seen; `max_steps` ends sooner.
        batch_size: samples an optimizer step, over all processes and micro-batches.
        micro_batch_size: samples in one forward pass of one process.
        max_length: tokens of prompt and answer; longer answers are cut, and counted.
        learning_rate: its peak; None: the stage's published one.
        warmup_epochs: linear rise from 0, then linear fall to 0 at the end.
        weight_decay: of AdamW (betas 0.9 and 0.95).
        clip_value: every gradient element is clipped to [-clip_value, clip_value].
        noise: uniform noise on the target's features.
        bf16: the draft computes in bfloat16 under autocast; its weights stay float32 while they are trained.
        feature_cache_gb: what the target made of samples is kept on disk, up to so many gigabytes (10^9 bytes); 0: it
            reads every sample anew. The result is the same bit for bit.
        feature_cache: the folder of it, which runs over one target may share; None: `features` in `out`.
        gradient_checkpointing: the draft's layer is computed again in the backward pass.
        loss_chunk: positions whose logits exist at one time.
        max_target_loss: nats a token above which the target's loss on its own answers is absurd; None: half of
            log(vocabulary).
        seed: of the first weights, the order of the samples and the noise.
        image_root: where picture paths start; None: where they were when the answers were collected.
        log_every, checkpoint_every: steps.
        keep_checkpoints: how many of the newest are kept.
        export: also writes `out/published`, the layout of published checkpoints with the target's embedding.
    """

    data: tuple[str, ...]
    out: str
    stage: int = 2
    draft: str | None = None
    kind: str = "vispec"
    balanced: bool = False
    num_queries: int = 2
    global_feature: bool = True
    picture_rows: bool = True
    head_size: int | None = None
    mtp_steps: int | None = None
    mtp_warmup: float = 0.0
    rollout: str = "whole"
    feature_weight: float | None = None
    cross_entropy_weight: float | None = None
    distance_weight: float | None = None
    ranking_weight: float | None = None
    epochs: int = 20
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int = 1
    max_length: int = 2048
    learning_rate: float | None = None
    warmup_epochs: float = 1.0
    weight_decay: float = 0.01
    clip_value: float = 0.5
    noise: bool = True
    bf16: bool = False
    feature_cache_gb: float = 0.0
    feature_cache: str | None = None
    gradient_checkpointing: bool = False
    loss_chunk: int = 128
    max_target_loss: float | None = None
    seed: int = 0
    image_root: str | None = None
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    export: bool = False

    def __post_init__(self) -> None:
        # One folder may be given by itself, and JSON has lists.
        folders = [self.data] if isinstance(self.data, str) else self.data
        if not isinstance(folders, list | tuple) or not folders or not all(isinstance(one, str) for one in folders):
            raise ValueError(f"fit: data must be one folder or several, got {self.data!r}")
        object.__setattr__(self, "data", tuple(folders))
        for field in fields(self)[1:]:
            _check_type(field.name, getattr(self, field.name), str(field.type))
        if self.stage not in LEARNING_RATES:
            raise ValueError(f"fit: stage must be 1 or 2, got {self.stage}")
        least = {"num_queries": 0, "max_length": 3, "clip_value": 0, "warmup_epochs": 0, "weight_decay": 0}
        least |= dict.fromkeys((*WEIGHTS, "feature_cache_gb", "mtp_warmup"), 0)
        least |= {"mtp_steps": 0, "max_steps": 1, "seed": 0, "head_size": MAX_TOP_K}
        ones = ("epochs", "batch_size", "micro_batch_size", "loss_chunk", "log_every", "checkpoint_every")
        least |= dict.fromkeys((*ones, "keep_checkpoints"), 1)
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"fit: {name} must be at least {bound}, got {value}")
        for name, known in (("rollout", ROLLOUTS), ("kind", KINDS)):
            if getattr(self, name) not in known:
                raise ValueError(f"fit: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.kind == "medusa" and self.export:
            raise ValueError("fit: export must be false for heads, which have no published layout here")
        if self.balanced and (self.draft is not None or self.kind != "vispec"):
            raise ValueError("fit: balanced must be false for heads and with a draft to start from")
        if self.num_queries and not self.picture_rows and self.kind == "vispec":
            raise ValueError(f"fit: picture_rows must be true with an adaptor, got {self.num_queries} queries")
        if self.mtp_warmup > 1:
            raise ValueError(f"fit: mtp_warmup must be at most 1, got {self.mtp_warmup}")
        if not any(astuple(self.loss_weights)):
            raise ValueError("fit: at least one loss weight must be above 0, got none")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"fit: learning_rate must be above 0, got {self.learning_rate}")

    @property
    def passes(self) -> int:
        """Passes of the draft over each sample, or its heads."""
        if self.mtp_steps is not None:
            return 1 + self.mtp_steps
        return MEDUSA_HEADS if self.kind == "medusa" else self.stage

    @property
    def inside_pictures(self) -> bool:
        """Whether the draft reads the target's features inside pictures."""
        return self.kind == "vispec" and self.num_queries == 0 and self.picture_rows

    def passes_of(self, number: int, steps: int) -> int:
        """Passes in step `number` of 1 to `steps`, fewer than all while they rise."""
        if number > self.mtp_warmup * steps:
            return self.passes
        return 1 + int((number - 1) / (self.mtp_warmup * steps) * (self.passes - 1))

    @property
    def loss_weights(self) -> LossWeights:
        """The stage's weights, but for those that are given."""
        given = {name.removesuffix("_weight"): getattr(self, name) for name in WEIGHTS}
        return replace(STAGES[self.stage], **{name: value for name, value in given.items() if value is not None})

    @property
    def peak_learning_rate(self) -> float:
        return LEARNING_RATES[self.stage] if self.learning_rate is None else self.learning_rate

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "data": list(self.data)}

    def save(self, folder: Path, more: dict[str, Any]) -> None:
        """Writes `training.json`: this config, and whatever else a reader of the weights should know."""
        text = json.dumps({"config": self.as_dict(), **more}, indent=2)
        (folder / USED_CONFIG).write_text(text + "\n", encoding="utf-8")


def _check_type(name: str, value: Any, annotation: str) -> None:
    if value is None and "None" in annotation:
        return
    kinds = {"str": str, "int": int, "float": (int, float), "bool": bool}
    kind = annotation.removesuffix(" | None")
    wrong_bool = isinstance(value, bool) and kind != "bool"
    if wrong_bool or not isinstance(value, kinds[kind]):
        raise ValueError(f"fit: {name} must be {kind}, got {value!r}")


def read_config(path: str | Path | None, overrides: dict[str, Any]) -> FitConfig:
    """Reads a YAML or JSON file (a saved `training.json` too), with `overrides` on top.

    Raises: FileNotFoundError; ImportError for YAML without pyyaml; ValueError for unknown names and bad values.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_mapping(Path(path))
    values = {**values, **overrides}
    known = [field.name for field in fields(FitConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"fit: unknown setting {', '.join(unknown)}; known: {', '.join(known)}")
    missing = [name for name in ("data", "out") if name not in values]
    if missing:
        raise ValueError(f"fit: {' and '.join(missing)} must be given, got neither in the config nor as an option")
    return FitConfig(**values)


def _read_mapping(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"fit: {path} must be JSON: {error}") from error
        values = values.get("config", values) if isinstance(values, dict) else values
    else:
        try:
            import yaml
        except ImportError as error:
            raise ImportError(f"fit: {path} needs pyyaml (pip install pyyaml), or write it as .json") from error
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"fit: {path} must be YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"fit: {path} must hold names and values, got {type(values).__name__}")
    # YAML 1.1 reads 3e-5 as text.
    return {name: _number(value) for name, value in values.items()}


def _number(value: Any) -> Any:
    if isinstance(value, str) and value[:1].isdigit():
        try:
            return float(value)
        except ValueError:
            return value
    return value
