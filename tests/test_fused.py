"""A decoder's pass over a tree with our kernels between its linear layers, against the decoder itself."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests import tiny
from tests.ops.cases import tree_of
from tests.ops.conftest import Backend, available
from vispec import ops
from vispec.targets import load_target
from vispec.targets.fused import FusedDecoder
from vispec.tree import DraftTree

# Heads of 64, two for one key-value head.
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPT = 40


FAMILIES = ("llama", "qwen2", "qwen2_5_vl")


def built(name: str, **more):
    return tiny.build(name, **{**SIZES, **more}).model


def features_of(model, dtype: torch.dtype, nodes: int, backend: Backend, fused: bool) -> torch.Tensor:
    """Features of a tree from the decoder itself or from its fused form, on the CPU in float64."""
    target = load_target(model.to(backend.device, dtype))
    generator = torch.Generator().manual_seed(nodes)
    tokens = torch.randint(3, tiny.VOCABULARY, (2, PROMPT), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    tree = tree_of(2, nodes, tiny.VISION_END)
    tree = DraftTree(*(part.to(backend.device) for part in list(vars(tree).values())[:5]), longest_path=nodes)
    with torch.inference_mode():
        prompt = target.prefill({"input_ids": tokens.to(backend.device), "attention_mask": mask.to(backend.device)})
        if not fused:
            with mock.patch.object(FusedDecoder, "of", return_value=None):
                return target.verify(tree, prompt.next_positions, prompt.cache)[1].double().cpu()
        prompt.cache.begin(nodes)
        positions = target.verify_positions(prompt.next_positions[:, None] + tree.depths)
        with ops.use_backend(None if backend.name == "cuda" else backend.name):
            decoder = FusedDecoder.of(target.decoder)
            return decoder(tree.tokens, positions, tree.ancestors, prompt.cache).double().cpu()


def both_ways(model, dtype: torch.dtype, nodes: int, backend: Backend) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(features_of(model, dtype, nodes, backend, fused) for fused in (False, True))


@pytest.fixture(params=["reference", "native", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request):
    return available(request.param)


@pytest.mark.parametrize("nodes", [1, 12, 65])
@pytest.mark.parametrize("name", FAMILIES)
def test_float32_features_are_the_decoders(name, nodes, kernels):
    own, fused = both_ways(built(name), torch.float32, nodes, kernels)
    assert (fused - own).abs().max() < 2e-4 * own.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_is_as_near_to_the_truth_as_the_decoder_itself(name, dtype, kernels):
    exact = features_of(built(name).to(dtype), torch.float64, 30, available("reference"), fused=False)
    own, fused = both_ways(built(name), dtype, 30, kernels)
    assert (fused - exact).abs().mean() < 1.2 * (own - exact).abs().mean()


def test_an_adapter_on_a_linear_layer_is_used():
    model = built("llama")
    layer = model.model.layers[1].self_attn.q_proj
    handle = layer.register_forward_hook(lambda module, args, output: output * 1.5)
    own, fused = both_ways(model, torch.float32, 12, available("reference"))
    handle.remove()
    plain, _ = both_ways(model, torch.float32, 12, available("reference"))
    assert (fused - own).abs().max() < 2e-4 * own.abs().max()
    assert (plain - own).abs().max() > 0.05 * own.abs().max()


def hooked(model) -> None:
    model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: output * 2)


def overridden(model) -> None:
    norm = model.model.layers[0].input_layernorm
    norm.forward = lambda hidden: hidden


def float32_norms(model) -> None:
    model.to(torch.bfloat16)
    model.model.norm.float()


def one_float32_norm(model) -> None:
    model.to(torch.bfloat16)
    model.model.layers[1].post_attention_layernorm.float()


class Doubled(LlamaRMSNorm):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def another_norm(model) -> None:
    model.model.layers[1].input_layernorm = Doubled(128)


@pytest.mark.parametrize("change", [hooked, overridden, float32_norms, one_float32_norm, another_norm])
def test_a_decoder_that_someone_altered_is_left_to_itself(change):
    model = built("llama")
    assert FusedDecoder.of(model.model) is not None
    change(model)
    assert FusedDecoder.of(model.model) is None


def test_decoders_with_more_in_their_layers_are_left_to_themselves():
    others = [
        Qwen3ForCausalLM(Qwen3Config(**tiny._text(**SIZES), head_dim=64)),  # norms on queries and keys
        built("llama", hidden_act="gelu"),
        built("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=0),
    ]
    for model in others:
        assert FusedDecoder.of(model.model) is None, type(model).__name__
