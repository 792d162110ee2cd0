"""Targets: Hugging Face models whose answers are reproduced, seen through one small protocol."""

from vispec.targets.base import Target
from vispec.targets.families import load_target
from vispec.targets.fused import join_projections
from vispec.targets.row_exact import check_rows, row_exact
from vispec.targets.self_check import self_check
from vispec.targets.settings import GenerationSettings, resolve_settings

__all__ = [
    "GenerationSettings",
    "Target",
    "check_rows",
    "join_projections",
    "load_target",
    "resolve_settings",
    "row_exact",
    "self_check",
]
