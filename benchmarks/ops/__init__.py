"""Every case of the op benchmark: one module an op."""

from __future__ import annotations

from benchmarks.ops import (
    accept,
    adaptor,
    build_tree,
    commit,
    grow_level,
    int8_linear,
    path_attention,
    rms_norm,
    rope_append,
    silu_mul,
    tree_attention,
)
from benchmarks.ops.case import Case

MODULES = (
    tree_attention,
    path_attention,
    accept,
    grow_level,
    build_tree,
    commit,
    adaptor,
    rope_append,
    rms_norm,
    silu_mul,
    int8_linear,
)
CASES: list[Case] = [case for module in MODULES for case in module.CASES]
