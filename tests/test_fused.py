"""A decoder's pass over a tree with our kernels between its linear layers, against the decoder itself."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests import tiny
from tests.ops.cases import random_tree
from tests.ops.conftest import Backend, available
from vispec import ops
from vispec.targets import load_target
from vispec.targets.fused import FusedDecoder
from vispec.tree import DraftTree

TEXT = {**tiny._text(), "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPT = 40


def llama(**more):
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, **more}))


def qwen2(**more):
    return Qwen2ForCausalLM(Qwen2Config(**{**TEXT, **more}))


def qwen2_5_vl(**more):
    rope = {"rope_type": "default", "type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 128}
    text = {**TEXT, "rope_parameters": rope, "rope_scaling": None, **more}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


BUILDERS = {"llama": llama, "qwen2": qwen2, "qwen2_5_vl": qwen2_5_vl}


def built(name: str, **more):
    torch.manual_seed(0)
    return BUILDERS[name](**more).eval()


def tree_of(nodes: int, generator: torch.Generator) -> DraftTree:
    tokens, parents = random_tree(2, nodes, tiny.VOCABULARY, generator)
    tree = DraftTree.empty(2, nodes, nodes, torch.device("cpu"))
    tree.tokens.copy_(tokens.clamp(min=3))
    tree.parents.copy_(parents)
    for row in range(2):
        depths, words = [0], [1]
        for node in range(1, nodes):
            depths.append(depths[parents[row, node]] + 1)
            words.append(words[parents[row, node]] | 1 << node)
        tree.depths[row] = torch.tensor(depths)
        for word in range(tree.ancestors.shape[2]):
            part = [bits >> 64 * word & (1 << 64) - 1 for bits in words]
            tree.ancestors[row, :, word] = torch.tensor([bits - (1 << 64) if bits >> 63 else bits for bits in part])
    return tree


def features_of(model, dtype: torch.dtype, nodes: int, backend: Backend, fused: bool) -> torch.Tensor:
    """Features of a tree from the decoder itself or from its fused form, on the CPU in float64."""
    target = load_target(model.to(backend.device, dtype))
    generator = torch.Generator().manual_seed(nodes)
    tokens = torch.randint(3, tiny.VOCABULARY, (2, PROMPT), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    tree = tree_of(nodes, generator)
    tree = DraftTree(*(part.to(backend.device) for part in list(vars(tree).values())[:5]), longest_path=nodes)
    with torch.inference_mode():
        prompt = target.prefill({"input_ids": tokens.to(backend.device), "attention_mask": mask.to(backend.device)})
        if not fused:
            return target.verify(tree, prompt.next_positions, prompt.cache)[1].double().cpu()
        prompt.cache.begin(nodes)
        positions = target.verify_positions(prompt.next_positions[:, None] + tree.depths)
        with ops.use_backend(None if backend.name == "cuda" else backend.name):
            decoder = FusedDecoder.of(target.decoder)
            return decoder(tree.tokens, positions, tree.ancestors, prompt.cache).double().cpu()


def both_ways(model, dtype: torch.dtype, nodes: int, backend: Backend) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(features_of(model, dtype, nodes, backend, fused) for fused in (False, True))


@pytest.fixture(params=["reference", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request):
    return available(request.param)


@pytest.mark.parametrize("nodes", [1, 12, 65])
@pytest.mark.parametrize("name", BUILDERS)
def test_float32_features_are_the_decoders(name, nodes, kernels):
    own, fused = both_ways(built(name), torch.float32, nodes, kernels)
    assert (fused - own).abs().max() < 2e-4 * own.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BUILDERS)
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


@pytest.mark.parametrize("change", [hooked, overridden, float32_norms])
def test_a_decoder_that_someone_altered_is_left_to_itself(change):
    model = built("llama")
    assert FusedDecoder.of(model.model) is not None
    change(model)
    assert FusedDecoder.of(model.model) is None


def test_decoders_with_more_in_their_layers_are_left_to_themselves():
    others = [
        Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=64)),  # norms on queries and keys
        llama(hidden_act="gelu"),
        llama(head_dim=48),
        qwen2(use_sliding_window=True, sliding_window=16, max_window_layers=0),
    ]
    for model in others:
        assert FusedDecoder.of(model.model) is None, type(model).__name__
