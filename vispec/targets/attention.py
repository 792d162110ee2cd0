"""The attention function that verification uses inside Hugging Face decoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from vispec import ops
from vispec.cache import KeyValueCache
from vispec.tree import DraftTree

NAME = "vispec_tree"
# Arguments by which some families ask for more than a softmax over the slots that the mask shows.
BEYOND_SOFTMAX = ("sliding_window", "softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")


class TreePass:
    """One verification pass: what its attention layers need beside the tensors that a decoder hands them.

    Args:
        cache: has begun the pass over the tree's nodes.
        exact_nodes: of so many nodes layers that fit are computed by `ops.path_attention`, on every device, and the
            others are padding; 0: no such pass.
        dense: hand the decoder the dense mask. Otherwise `mask` is a stand-in of the same shape that holds NaN, so
            that a decoder which reads it after all gives logits that no round accepts.

    Attributes:
        mask: the decoder's `attention_mask`, [B, 1, T, L'].
        served: layers whose attention was computed by one of our ops, which need no mask.
    """

    def __init__(
        self, cache: KeyValueCache, tree: DraftTree, dtype: torch.dtype, *, dense: bool, exact_nodes: int = 0
    ) -> None:
        self.cache = cache
        self.tree = tree
        self.dtype = dtype
        self.exact_nodes = exact_nodes
        self.served: set[int] = set()
        if dense:
            self.mask = self.dense_mask
        else:
            batch, tokens = tree.tokens.shape
            unread = torch.full((1, 1, 1, 1), torch.nan, dtype=dtype, device=tree.tokens.device)
            self.mask = unread.expand(batch, 1, tokens, cache.get_seq_length() + tokens)

    @cached_property
    def dense_mask(self) -> Tensor:
        """Built when it is first asked for."""
        return self.cache.mask(self.tree.mask(), self.dtype)

    def handed(self, mask: Tensor | None) -> bool:
        """Whether a layer got the pass's own mask, and not one that its model has made of it."""
        return mask is not None and mask.shape == self.mask.shape and mask.data_ptr() == self.mask.data_ptr()

    def attend(self, layer: int, query: Tensor, scale: float | None) -> Tensor:
        """One layer's attention by the op, over the whole cache: [B, T, H, D]."""
        self.served.add(layer)
        if self.exact_nodes:
            mixed = attend_along_paths(query, self.cache, layer, self.tree.ancestors, self.exact_nodes, scale)
            return mixed.transpose(1, 2)
        batch, heads, tokens, width = query.shape
        output = query.new_empty(batch, tokens, heads, width)
        ops.tree_attention(
            query,
            self.cache.keys[layer],
            self.cache.values[layer],
            self.tree.ancestors,
            self.cache.lengths,
            output=output.transpose(1, 2),
            scale=scale,
        )
        return output

    def fits(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, extras: Mapping[str, object]) -> bool:
        """Whether the op computes what this layer asks for: plain softmax attention over the cache as it is."""
        if layer not in range(len(self.cache.keys)) or any(extras.get(name) is not None for name in BEYOND_SOFTMAX):
            return False
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        # The layer may have repeated, joined or cut what the cache returned.
        if not (_is_view(key, keys) and _is_view(value, values)):
            return False
        if self.exact_nodes:
            return keys.shape == values.shape and keys.stride() == values.stride() and query.dtype is keys.dtype
        return ops.serves_tree_attention(query, keys, values)


def attend_along_paths(
    queries: Tensor, cache: KeyValueCache, layer: int, ancestors: Tensor, nodes: int, scale: float | None
) -> Tensor:
    """`ops.path_attention` [B, H, T, D] of rotated queries; where it may, of the first `nodes` alone, zeros behind."""
    batch, heads, tokens, width = queries.shape
    stores = cache.keys[layer], cache.values[layer]
    # As the output projection reads it.
    mixed = queries.new_empty(batch, tokens, heads, width)
    if not ops.counts_any_nodes(queries):
        nodes = tokens
    mixed[:, nodes:] = 0
    seen, output = ancestors[:, :nodes].contiguous(), mixed[:, :nodes].transpose(1, 2)
    ops.path_attention(queries[:, :, :nodes], *stores, seen, cache.lengths, output=output, scale=scale)
    return mixed.transpose(1, 2)


_running: ContextVar[TreePass | None] = ContextVar("vispec_tree_pass", default=None)


def _is_view(part: Tensor, store: Tensor) -> bool:
    """Whether `part` is the first slots of a layer's store [B, G, L, D]."""
    alike = (part.shape[:2], part.shape[3], part.stride()) == (store.shape[:2], store.shape[3], store.stride())
    return alike and part.data_ptr() == store.data_ptr()


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of T new tokens over the used slots of a cache, query heads grouped over key-value heads.

    Inside a `TreePass`, layers that fit are computed by our op from the pass's ancestors; all others by PyTorch from
    the dense mask.

    Shapes: query [B, H, T, D]; key and value [B, G, L, D]; attention_mask [B, 1, T, L], additive in the query's
    dtype. Returns: [B, T, H, D] and None in place of weights.
    """
    softcap = kwargs.get("softcap")
    if softcap is not None:
        raise ValueError(f"tree_attention: softcap must be None, got {softcap}")
    running = _running.get()
    if running is not None and running.handed(attention_mask):
        layer = getattr(module, "layer_idx", None)
        if running.fits(layer, query, key, value, kwargs):
            return running.attend(layer, query, scaling), None
        attention_mask = running.dense_mask
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2), None


AttentionInterface.register(NAME, tree_attention)


@contextmanager
def attention_of(config: object, tree_pass: TreePass) -> Iterator[None]:
    """Runs a decoder with our attention function on one pass and puts its own back, whatever happens."""
    own = config._attn_implementation
    config._attn_implementation = NAME
    token = _running.set(tree_pass)
    try:
        yield
    finally:
        _running.reset(token)
        config._attn_implementation = own
