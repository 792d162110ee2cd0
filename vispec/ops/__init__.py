"""The native ops: each writes tensors its caller allocated, and has a reference beside it."""

from vispec._native import build_info
from vispec.ops import registered as _registered  # noqa: F401  (torch.compile learns of the ops)
from vispec.ops.accept import Sampling, accept, accept_reference
from vispec.ops.adaptor import adaptor, adaptor_reference, attend
from vispec.ops.backend import use_backend
from vispec.ops.build_tree import build_tree, build_tree_reference
from vispec.ops.commit import Gather, RowState, commit, commit_reference, pointer_table
from vispec.ops.grow_level import grow_level, grow_level_reference
from vispec.ops.int8_linear import int8_linear, int8_linear_reference, int8_weight
from vispec.ops.path_attention import PATH_NODES, counts_any_nodes, path_attention, path_attention_reference
from vispec.ops.rms_norm import rms_norm, rms_norm_reference, serves_layers
from vispec.ops.rope_append import Tail, rope_append, rope_append_reference
from vispec.ops.silu_mul import silu_mul, silu_mul_reference
from vispec.ops.tree_attention import HEADS, serves_tree_attention, tree_attention, tree_attention_reference

__all__ = [
    "HEADS",
    "PATH_NODES",
    "Gather",
    "RowState",
    "Sampling",
    "Tail",
    "accept",
    "accept_reference",
    "adaptor",
    "adaptor_reference",
    "attend",
    "build_info",
    "build_tree",
    "build_tree_reference",
    "commit",
    "commit_reference",
    "counts_any_nodes",
    "grow_level",
    "grow_level_reference",
    "int8_linear",
    "int8_linear_reference",
    "int8_weight",
    "path_attention",
    "path_attention_reference",
    "pointer_table",
    "rms_norm",
    "rms_norm_reference",
    "rope_append",
    "rope_append_reference",
    "serves_layers",
    "serves_tree_attention",
    "silu_mul",
    "silu_mul_reference",
    "tree_attention",
    "tree_attention_reference",
    "use_backend",
]
