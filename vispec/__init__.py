"""vispec: lossless speculative decoding for Hugging Face vision-language models."""

from vispec.decode import GenerationResult, GenerationStats, fast_generate
from vispec.drafts import ViSpecDraft, load_draft
from vispec.tree import TreeConfig

__version__ = "0.1.0"

__all__ = [
    "GenerationResult",
    "GenerationStats",
    "TreeConfig",
    "ViSpecDraft",
    "fast_generate",
    "load_draft",
]
