"""Every case of the op benchmark: one module an op."""

from __future__ import annotations

from benchmarks.ops import accept, build_tree, commit, grow_level
from benchmarks.ops.case import Case

CASES: list[Case] = [case for module in (grow_level, build_tree, accept, commit) for case in module.CASES]
