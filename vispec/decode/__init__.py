"""The speculative loop: draft, verify, accept, commit."""

from vispec.decode.generate import GenerationResult, fast_generate
from vispec.decode.memory import release
from vispec.decode.stats import GenerationStats

__all__ = ["GenerationResult", "GenerationStats", "fast_generate", "release"]
