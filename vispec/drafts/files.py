"""How a draft lies in a folder: `config.json` and `model.safetensors`, as published checkpoints do."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


def write_draft(draft: nn.Module, folder: str | Path, more: dict[str, Any]) -> None:
    """Writes a draft's tensors, less an empty `head_tokens` (the whole vocabulary), and its config with `more`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in draft.state_dict().items()}
    if not tensors["head_tokens"].numel():
        del tensors["head_tokens"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        **asdict(draft.config),
        "architectures": [type(draft).__name__],
        "torch_dtype": str(draft_dtype(draft)).removeprefix("torch."),
        **more,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def draft_dtype(draft: nn.Module) -> torch.dtype:
    """Dtype of a draft's weights."""
    return next(draft.parameters()).dtype
