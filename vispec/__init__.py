"""vispec: lossless speculative decoding for Hugging Face vision-language models."""

from __future__ import annotations

import importlib
from types import ModuleType

from vispec.compare import audit
from vispec.decode import GenerationResult, GenerationStats, fast_generate, release
from vispec.drafts import ViSpecDraft, load_draft
from vispec.targets import join_projections
from vispec.tree import TreeConfig

__version__ = "0.1.0"

__all__ = [
    "GenerationResult",
    "GenerationStats",
    "TreeConfig",
    "ViSpecDraft",
    "audit",
    "fast_generate",
    "join_projections",
    "load_draft",
    "release",
]


def __getattr__(name: str) -> ModuleType:
    """`vispec.demo` is imported on first use: it is only needed by those who try the demo's model."""
    if name == "demo":
        return importlib.import_module("vispec.demo")
    raise AttributeError(f"module 'vispec' has no attribute {name!r}")
