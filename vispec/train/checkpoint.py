"""Checkpoints of a training run, and drafts as they leave it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vispec.drafts import MedusaDraft, ViSpecDraft, load_draft
from vispec.targets import Target
from vispec.train.config import FitConfig

FOLDER = "checkpoints"
STATE_VERSION = 1


def save_checkpoint(
    out: Path,
    step: int,
    draft: ViSpecDraft | MedusaDraft,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    keep: int,
) -> Path:
    """Writes weights, optimizer and step under another name, then renames; deletes all but the newest `keep`.

    Noise and the order of samples follow from the seed and the step, so there is no generator to save.
    Raises: OSError; a full disk with what to do about it.
    """
    folder = out / FOLDER / f"step-{step:08d}"
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        # As a draft that `load_draft` reads, so that a run can be measured while it goes on.
        draft.save_pretrained(part)
        torch.save(optimizer.state_dict(), part / "optimizer.pt")
        state = {"state_version": STATE_VERSION, "step": step, "config": config}
        (part / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        for path in part.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(part, ignore_errors=True)
        # Both writers wrap what the system said into errors of their own.
        if getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(out).free < _size(draft):
            message = f"fit: disk is full, {folder} was not written; earlier checkpoints are whole"
            raise OSError(errno.ENOSPC, f"{message}: free space and run again with --resume") from error
        raise
    for old in sorted(path for path in folder.parent.glob("step-*") if path.suffix != ".part")[:-keep]:
        shutil.rmtree(old)
    return folder


def _size(draft: nn.Module) -> int:
    """Bytes that a checkpoint takes: the weights and AdamW's two moments, float32."""
    return 12 * sum(parameter.numel() for parameter in draft.parameters())


CACHE = ("feature_cache", "feature_cache_gb")
# What a run's config and a draft's have in common.
SHAPES = ("num_queries", "global_feature", "picture_rows")
# Settings that may differ between a run and its continuation: they change nothing that was computed.
FREE_SETTINGS = ("out", "log_every", "checkpoint_every", "keep_checkpoints", "export", "image_root", *CACHE)


def load_checkpoint(out: Path, draft: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> int:
    """Fills draft and optimizer from the newest checkpoint. Returns: its step.

    Raises: FileNotFoundError where there is none; ValueError for one of another config or version.
    """
    found = sorted(path for path in (out / FOLDER).glob("step-*") if path.suffix != ".part")
    if not found:
        raise FileNotFoundError(f"fit: {out} must hold a checkpoint to resume from, got none")
    folder = found[-1]
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("state_version") != STATE_VERSION:
        raise ValueError(f"fit: {folder} must be of version {STATE_VERSION}, got {state.get('state_version')!r}")
    known = state["config"]
    for name in sorted(set(known) | set(config)):
        if name not in FREE_SETTINGS and known.get(name) != config.get(name):
            raise ValueError(
                f"fit: {name} must be {known.get(name)!r} as in {folder}, got {config.get(name)!r}: "
                "a run is resumed with its own settings"
            )
    tensors = {"head_tokens": torch.empty(0, dtype=torch.int64), **load_file(folder / "model.safetensors")}
    if not torch.equal(tensors["head_tokens"], draft.head_tokens.cpu()):
        raise ValueError(f"fit: data must be as it was when {folder} was written, got answers with other token counts")
    draft.load_state_dict(tensors)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    return int(state["step"])


def frequent_tokens(counts: Tensor, size: int) -> Tensor:
    """The `size` token ids of the highest counts [V], in order of their ids; of equal counts the lower ids."""
    order = counts.argsort(descending=True, stable=True)
    return order[:size].sort().values


def starting_draft(config: FitConfig, target: Target, counts: Tensor) -> ViSpecDraft | MedusaDraft:
    """The draft that training starts from, float32: fresh, or the config's own, with an adaptor where it had none.

    Its vocabulary is the one it came with, or the `head_size` tokens that the answers hold most.

    Shapes: `counts` [V] int64, how often each token occurs in the answers.
    Raises: ValueError for another number of queries, and for a vocabulary of another size.
    """
    draft = _fresh(config, target) if config.draft is None else _known(config, target)
    own = draft.head_tokens.numel()
    if own and config.head_size not in (None, own):
        raise ValueError(f"fit: head_size must be {own} as in {config.draft}, got {config.head_size}")
    if config.head_size is not None and not own:
        if config.head_size > target.vocabulary:
            raise ValueError(f"fit: head_size must be at most {target.vocabulary}, got {config.head_size}")
        draft.head_tokens = frequent_tokens(counts, config.head_size)
    if config.export and draft.head_tokens.numel():
        raise ValueError("fit: export must be false with a reduced vocabulary, which published checkpoints do not have")
    return draft.to(target.device, torch.float32).train()


def _fresh(config: FitConfig, target: Target) -> ViSpecDraft | MedusaDraft:
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if config.kind == "medusa":
            return MedusaDraft.for_target(target, config.passes)
        draft = ViSpecDraft.for_target(target, config.num_queries)
        # Neither of these has weights.
        return _resized(draft, global_feature=config.global_feature, picture_rows=config.picture_rows)


def _known(config: FitConfig, target: Target) -> ViSpecDraft | MedusaDraft:
    """The draft that the config names, with a fresh adaptor where it had none and one is asked for."""
    draft = load_draft(config.draft, target)
    if isinstance(draft, MedusaDraft):
        found, wanted = {"kind": "medusa", "heads": draft.config.num_heads}, {"heads": config.passes}
    else:
        if not draft.config.num_queries and config.num_queries:
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                draft = _resized(draft, num_queries=config.num_queries, picture_rows=True)
        found = {"kind": "vispec", **{name: getattr(draft.config, name) for name in SHAPES}}
        wanted = {name: getattr(config, name) for name in SHAPES}
    for name, value in {"kind": config.kind, **wanted}.items():
        if found[name] != value:
            raise ValueError(f"fit: {name} must be {found[name]} as in {config.draft}, got {value}")
    return draft


def _resized(draft: ViSpecDraft, **changes: Any) -> ViSpecDraft:
    """A draft of another config with the weights that both have."""
    other = ViSpecDraft(replace(draft.config, **changes))
    other.head_tokens = torch.empty_like(draft.head_tokens)
    other.load_state_dict({**other.state_dict(), **draft.state_dict()})
    return other


def balance(draft: ViSpecDraft, feature_size: float, embedding_size: float, seed: int) -> None:
    """Scales fresh weights, in place, to a target's root-mean-square feature and embedding.

    `fc` starts as half the feature plus as much of the embedding, mixed at random, and the MLP's output is as large
    as a feature; the usual start leaves a small draft far from both for much of a short training.
    """
    width = draft.config.hidden_size
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(seed)) * width**-0.5
    layer = draft.layers[0]
    with torch.no_grad():
        draft.fc.weight[:, :width] = (mix * (0.5 * feature_size / embedding_size)).to(draft.fc.weight)
        draft.fc.weight[:, width:] = 0.5 * torch.eye(width).to(draft.fc.weight)
        if draft.fc.bias is not None:
            draft.fc.bias.zero_()
        layer.self_attn.o_proj.weight.mul_(0.3)
        layer.mlp.down_proj.weight.mul_(feature_size)


def finished_draft(draft: ViSpecDraft | MedusaDraft, dtype: torch.dtype) -> ViSpecDraft | MedusaDraft:
    """A copy of the draft in the target's dtype, ready for use."""
    copy = type(draft)(draft.config)
    copy.head_tokens = torch.empty_like(draft.head_tokens)
    copy.load_state_dict(draft.state_dict())
    return copy.to(device=draft.head_tokens.device, dtype=dtype).eval().requires_grad_(False)


def export_published(draft: ViSpecDraft, target: Target, folder: str | Path) -> None:
    """Writes a draft in the layout of published checkpoints, with the target's embedding.

    `config.json` carries the target's model type and sizes, as theirs do. `vispec.load_draft` reads it back.
    Raises: ValueError for a draft of another target or with a vocabulary of its own.
    """
    draft.check(target)
    if draft.head_tokens.numel():
        raise ValueError(
            f"export_published: the draft must propose the whole vocabulary, got {draft.head_tokens.numel()} tokens"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in draft.state_dict().items()}
    del tensors["head_tokens"]
    dtype = draft.fc.weight.dtype
    # A copy: a target's embedding may share its memory with the head.
    tensors["embed_tokens.weight"] = target.embedding.weight.detach().to("cpu", dtype, copy=True).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    own, text = draft.config, target.text_config
    config = {
        "architectures": [type(target.model).__name__],
        "model_type": target.model.config.model_type,
        "hidden_act": "silu",
        "hidden_size": own.hidden_size,
        "intermediate_size": own.intermediate_size,
        "max_position_embeddings": target.max_positions,
        "num_attention_heads": own.num_attention_heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": own.key_value_heads,
        "rms_norm_eps": own.rms_norm_eps,
        "rope_theta": own.rope_theta,
        "vocab_size": own.vocab_size,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if own.qkv_bias:
        config["qkv_bias"] = True
    config |= {name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
