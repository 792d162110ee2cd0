"""Targets: Hugging Face models whose answers are reproduced, seen through one small protocol."""

from vispec.targets.base import Target
from vispec.targets.families import load_target
from vispec.targets.self_check import self_check
from vispec.targets.settings import GenerationSettings, resolve_settings

__all__ = [
    "GenerationSettings",
    "Target",
    "load_target",
    "resolve_settings",
    "self_check",
]
