"""The engine's benchmark: its targets have the sizes that its floors are computed from, and its draft keeps pace."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_engine
from benchmarks.engine.targets import SHAPES, TINY_SHAPES


@pytest.mark.parametrize("name", [*SHAPES, *TINY_SHAPES])
def test_the_floor_counts_the_weights_that_a_pass_reads(name):
    shape = {**SHAPES, **TINY_SHAPES}[name]
    model = shape.build(torch.bfloat16, "meta")
    layers = model.model.language_model.layers
    matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
    assert sum(weight.numel() for weight in matrices) == shape.layer_weights
    assert model.get_output_embeddings().weight.numel() == shape.head_weights
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert shape.cache_elements(3) == 2 * 3 * len(layers) * text.num_key_value_heads * width


def test_rounds_accept_the_tokens_that_the_paced_draft_is_told_to():
    rows = bench_engine.check()
    assert [row["target"] for row in rows] == [name for name in TINY_SHAPES for _ in range(2)]
    assert all(abs(row["tau"] - row["published_tau"]) < 0.3 for row in rows)
