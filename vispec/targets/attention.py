"""The attention function that verification uses inside Hugging Face decoders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "vispec_tree"


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

    Shapes: query [B, H, T, D]; key and value [B, G, L, D]; attention_mask [B, 1, T, L], additive in the query's
    dtype. Returns: [B, T, H, D] and None in place of weights.
    """
    softcap = kwargs.get("softcap")
    if softcap is not None:
        raise ValueError(f"tree_attention: softcap must be None, got {softcap}")
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
def attention_of(config: object, name: str = NAME) -> Iterator[None]:
    """Runs a decoder with another attention function and puts its own back, whatever happens."""
    own = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = own
