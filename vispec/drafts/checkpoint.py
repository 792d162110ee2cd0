"""Reading drafts: published ViSpec checkpoints, our own, EAGLE-1/2, and what they are compared with."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vispec.drafts.lookup import PromptLookupDraft
from vispec.drafts.medusa import MedusaDraft, MedusaDraftConfig
from vispec.drafts.oracle import OracleDraft
from vispec.drafts.vispec import ViSpecDraft, ViSpecDraftConfig
from vispec.drafts.weights import check_format
from vispec.targets import load_target

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
# Drafts without weights, by name.
NAMED = {"prompt-lookup": PromptLookupDraft, "oracle": OracleDraft}
# Buffers that some exporters write and that follow from the config.
DERIVED = ("layers.0.self_attn.rotary_emb.inv_freq",)


def load_draft(
    folder_or_hub_id: str | Path, target: Any, *, local_files_only: bool = False, weights: str | None = None
) -> ViSpecDraft | MedusaDraft | PromptLookupDraft | OracleDraft:
    """Loads a draft for a target, in the target's dtype and on its device.

    Reads `config.json` beside `model.safetensors` or `pytorch_model.bin` (the latter as plain tensors only). What
    the published config leaves out (the number of adaptor queries, biases, key-value heads) is read off the
    tensors. A checkpoint without adaptor is EAGLE's: image tokens then go into the draft one by one.

    Args:
        folder_or_hub_id: a folder, or a repository of the Hugging Face hub such as
            ``JLKang/ViSpec-Qwen2.5-VL-7B-Instruct``; or ``prompt-lookup`` or ``oracle``, which have no weights.
        target: the Hugging Face model that the draft was made for.
        local_files_only: do not ask the hub for what is not in the local cache.
        weights: "int8" halves what a round of a ViSpec or EAGLE draft reads on a GPU, and takes half a draft's and a
            head's memory more, since the prompt is still read with the weights as they are. It cannot change an
            answer, only how much of a tree is accepted. On a CPU it is slower. None: as they are.

    Raises:
        FileNotFoundError: no config or no weights.
        ValueError: a corrupt or unsafe file, tensors missing or left over, a draft made for another target, or weights
            in a format that this kind of draft cannot have.
    """
    check_format(weights)
    target = load_target(target)
    if weights is not None and str(folder_or_hub_id) in NAMED:
        raise ValueError(f"load_draft: weights must be None for {folder_or_hub_id}, which has none, got {weights!r}")
    if str(folder_or_hub_id) in NAMED:
        return NAMED[str(folder_or_hub_id)]()
    folder = _folder(folder_or_hub_id, local_files_only)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"load_draft: {folder} must hold config.json")
    try:
        settings = json.loads(config_file.read_text())
    except ValueError as error:
        raise ValueError(f"load_draft: {config_file} must be JSON: {error}") from error
    tensors = _read_tensors(folder)
    if settings.get("architectures") == [MedusaDraft.__name__]:
        draft = MedusaDraft(_medusa_config(settings))
    else:
        config = _config(settings, tensors, folder)
        _drop_embedding(tensors, config)
        draft = ViSpecDraft(config)
    if weights is not None:
        if not isinstance(draft, ViSpecDraft) or draft.config.hidden_size % 16 or draft.config.intermediate_size % 16:
            raise ValueError(
                "load_draft: weights must be None for drafts other than ViSpec's and EAGLE's, and where sizes are no "
                f"multiples of 16, got {weights!r} for {type(draft).__name__}"
            )
        draft.weights = weights
    draft.check(target)
    _fill(draft, tensors, folder)
    return draft.to(device=target.device, dtype=target.dtype).eval().requires_grad_(False)


def _drop_embedding(tensors: dict[str, Tensor], config: ViSpecDraftConfig) -> None:
    """Published checkpoints carry the target's embedding, which the draft shares."""
    embedding = tensors.pop("embed_tokens.weight", None)
    if embedding is not None and embedding.shape != (config.vocab_size, config.hidden_size):
        raise ValueError(
            f"load_draft: embed_tokens.weight must be {(config.vocab_size, config.hidden_size)}, "
            f"got {tuple(embedding.shape)}"
        )


def _folder(name: str | Path, local_files_only: bool) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(name).count("/") != 1:
        raise FileNotFoundError(f"load_draft: {name} must be a folder or a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    files = ["config.json", SAFETENSORS, PICKLE]
    try:
        return Path(snapshot_download(str(name), allow_patterns=files, local_files_only=local_files_only))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"load_draft: {name} must be a folder or a repository of the hub, got neither: {error}"
        ) from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / SAFETENSORS
    if path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"load_draft: {path} must be a whole safetensors file: {error}") from error
    path = folder / PICKLE
    if not path.is_file():
        raise FileNotFoundError(f"load_draft: {folder} must hold {SAFETENSORS} or {PICKLE}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"load_draft: {path} must hold plain tensors and nothing else: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"load_draft: {path} must hold a dict of tensors, got {type(tensors).__name__}")
    return tensors


def _config(settings: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> ViSpecDraftConfig:
    for name in ("fc.weight", "layers.0.self_attn.k_proj.weight", "layers.0.mlp.gate_proj.weight"):
        if name not in tensors:
            raise ValueError(f"load_draft: {folder} must hold the tensor {name}: not a ViSpec or EAGLE draft")
    _check_numbers(settings, ("hidden_size", "num_attention_heads", "vocab_size"))
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    if hidden % heads:
        raise ValueError(f"load_draft: hidden_size must be a multiple of num_attention_heads, got {hidden} and {heads}")
    rope = settings.get("rope_parameters") or {}
    shared = tensors["layers.0.self_attn.k_proj.weight"].shape[0] // (hidden // heads)
    queries = tensors.get("imadpt.q")
    return ViSpecDraftConfig(
        hidden_size=hidden,
        intermediate_size=tensors["layers.0.mlp.gate_proj.weight"].shape[0],
        num_attention_heads=heads,
        num_key_value_heads=None if shared == heads else shared,
        vocab_size=settings["vocab_size"],
        num_queries=0 if queries is None else queries.shape[0],
        rms_norm_eps=settings.get("rms_norm_eps", 1e-5),
        rope_theta=settings.get("rope_theta") or rope.get("rope_theta", 10000.0),
        qkv_bias="layers.0.self_attn.q_proj.bias" in tensors,
        fc_bias="fc.bias" in tensors,
        global_feature=settings.get("global_feature", True),
        picture_rows=settings.get("picture_rows", True),
    )


def _medusa_config(settings: dict[str, Any]) -> MedusaDraftConfig:
    names = ("hidden_size", "vocab_size", "num_heads")
    _check_numbers(settings, names)
    return MedusaDraftConfig(*(settings[name] for name in names))


def _check_numbers(settings: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(settings.get(name), int):
            raise ValueError(f"load_draft: config.json must give {name}, got {settings.get(name)!r}")


def _fill(draft: ViSpecDraft | MedusaDraft, tensors: dict[str, Tensor], folder: Path) -> None:
    """Loads strictly; a text-only checkpoint has no `img_fc`, and [I | 0] stands for it."""
    optional = {"head_tokens"}
    if isinstance(draft, ViSpecDraft) and draft.imadpt is None:
        optional |= {"img_fc.weight", "img_fc.bias"}
    own = draft.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if name not in DERIVED}
    missing = sorted(set(own) - set(tensors) - optional)
    unknown = sorted(set(tensors) - set(own))
    if missing or unknown:
        raise ValueError(f"load_draft: {folder} must hold the draft's tensors: missing {missing}, unknown {unknown}")
    if "head_tokens" in tensors:
        draft.head_tokens = torch.empty_like(tensors["head_tokens"], dtype=torch.int64)
        _check_head_tokens(tensors["head_tokens"], draft.config.vocab_size)
    for name, tensor in tensors.items():
        if name != "head_tokens" and tensor.shape != own[name].shape:
            raise ValueError(f"load_draft: {name} must be {tuple(own[name].shape)}, got {tuple(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"load_draft: {name} must be finite, got NaN or infinity")
    draft.load_state_dict({**own, **tensors})


def _check_head_tokens(tokens: Tensor, vocabulary: int) -> None:
    if tokens.ndim != 1 or len(tokens.unique()) != len(tokens):
        raise ValueError("load_draft: head_tokens must be a list of different token ids, got duplicates")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ValueError(
            f"load_draft: head_tokens must lie in [0, {vocabulary}), got [{int(tokens.min())}, {int(tokens.max())}]"
        )
