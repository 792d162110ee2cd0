"""A small real vision-language model with its draft and pictures, for the demo and for tests."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vispec.demo.smollava import WEIGHTS, Target, load_target
from vispec.tree import TreeConfig

__all__ = ["TREE", "Demo", "Sample", "Target", "load", "load_target", "samples"]

SAMPLES = Path(__file__).parent / "samples"
DRAFT = WEIGHTS / "draft"
# Small, because in float32 a CPU pays for every further node; larger trees pay in bfloat16 (bench_generate --sweep).
TREE = TreeConfig(depth=3, top_k=2, total_tokens=8)


class Demo(NamedTuple):
    """SmolLaVA, its draft (None where none was trained) and its processor."""

    model: Any
    draft: Any
    processor: Any


class Sample(NamedTuple):
    """One photograph that the demo model was not trained on."""

    path: Path
    prompt: str
    credit: str


def load(dtype: torch.dtype | None = None, device: str | torch.device = "cpu", adapted: bool = True) -> Demo:
    """Load SmolLaVA and its draft.

    `dtype` is float32 unless given. `adapted=False` leaves out the LoRA update of the language
    model, which the draft was trained with.
    Raises: ImportError naming the pip command when a package that carries weights is missing.
    """
    model, processor = load_target(dtype, device, adapted)
    draft = None
    if (DRAFT / "model.safetensors").is_file():
        # Here, so that the target alone can be had without the engine.
        from vispec.drafts.checkpoint import load_draft

        draft = load_draft(DRAFT, target=model)
    return Demo(model, draft, processor)


def samples() -> list[Sample]:
    """List the six sample photographs with a prompt and a credit line each."""
    listed = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))
    return [Sample(SAMPLES / one["file"], one["prompt"], one["credit"]) for one in listed]
