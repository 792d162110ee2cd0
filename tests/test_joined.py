"""Weights laid one behind another: the same model to its owner, one product to a verification pass."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vispec
from tests.ops.conftest import available
from tests.test_fused import built, features_of
from vispec.targets.fused import FusedDecoder
from vispec.targets.joined import join, joined

FAMILIES = ("llama", "qwen2", "qwen2_5_vl")  # the last two have biases on queries, keys and values


def groups_of(model) -> list[list[nn.Linear]]:
    layers = model.get_decoder().layers
    attentions = [[layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj] for layer in layers]
    return attentions + [[layer.mlp.gate_proj, layer.mlp.up_proj] for layer in layers]


def are_joined(model) -> set[bool]:
    return {joined(group) is not None for group in groups_of(model)}


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_keep_their_identity_and_their_values(name):
    model = built(name)
    before = {key: (parameter, parameter.detach().clone()) for key, parameter in model.named_parameters()}
    assert are_joined(model) == {False}
    assert vispec.join_projections(model) == len(groups_of(model))
    assert are_joined(model) == {True}
    for key, parameter in model.named_parameters():
        assert parameter is before[key][0] and torch.equal(parameter, before[key][1])
        assert parameter.requires_grad and parameter.is_contiguous() and not parameter.is_inference()
    for group in groups_of(model):
        weight, bias = joined(group)
        assert torch.equal(weight, torch.cat([linear.weight for linear in group]))
        assert (bias is None) == (group[0].bias is None)
        assert bias is None or torch.equal(bias, torch.cat([linear.bias for linear in group]))


def test_joining_again_moves_nothing():
    model = built("llama")
    count = vispec.join_projections(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    assert vispec.join_projections(model) == count
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


@pytest.mark.parametrize("backend", ["native", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_product_is_as_near_to_the_truth_as_the_decoder_itself(name, backend):
    kernels = available(backend)
    model = built(name).to(torch.bfloat16)
    exact = features_of(copy.deepcopy(model), torch.float64, 30, available("reference"), fused=False)
    vispec.join_projections(model.to(kernels.device))
    assert all(product.whole is not None for pair in FusedDecoder.of(model.get_decoder()).products for product in pair)
    own, fused = (features_of(model, torch.bfloat16, 30, kernels, fused) for fused in (False, True))
    assert (fused - exact).abs().mean() < 1.2 * (own - exact).abs().mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_stay_those_of_generate(name):
    model = built(name)
    inputs = {"input_ids": torch.randint(10, 40, (2, 9), generator=torch.Generator().manual_seed(3))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    vispec.join_projections(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), expected)
    assert torch.equal(vispec.fast_generate(model, None, inputs, max_new_tokens=12), expected)


def hooked(model) -> None:
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, output: output)


def overridden(model) -> None:
    model.model.layers[0].self_attn.k_proj.forward = lambda rows: rows


def wrapped(model) -> None:
    attention = model.model.layers[0].self_attn
    attention.k_proj = nn.Sequential(attention.k_proj)


def of_another_dtype(model) -> None:
    model.model.layers[0].self_attn.k_proj.to(torch.bfloat16)


def with_one_bias(model) -> None:
    attention = model.model.layers[0].self_attn
    attention.k_proj.bias = nn.Parameter(torch.zeros(attention.k_proj.out_features))


def frozen_into_inference_mode(model) -> None:
    attention = model.model.layers[0].self_attn
    with torch.inference_mode():
        attention.k_proj.weight = nn.Parameter(attention.k_proj.weight.clone(), requires_grad=False)


@pytest.mark.parametrize(
    "change", [hooked, overridden, wrapped, of_another_dtype, with_one_bias, frozen_into_inference_mode]
)
def test_a_layer_that_is_more_than_its_weight_is_left_as_it_is(change):
    model = built("llama")
    change(model)
    kept = model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert vispec.join_projections(model) == len(groups_of(model)) - 1
    assert model.model.layers[0].self_attn.q_proj.weight.data_ptr() == kept


@pytest.mark.parametrize("change", [hooked, overridden])
def test_a_change_after_joining_is_noticed(change):
    model = built("llama").to(torch.bfloat16)
    vispec.join_projections(model)
    change(model)
    products = FusedDecoder.of(model.model).products
    assert products[0][0].whole is None
    assert products[1][0].whole is not None


def test_weights_that_would_begin_inside_a_cache_line_stay_apart():
    # 30 rows of 20 float32: 2400 bytes, no multiple of 64.
    linears = [nn.Linear(20, 30, bias=False), nn.Linear(20, 30, bias=False)]
    before = [linear.weight.data_ptr() for linear in linears]
    assert not join(linears)
    assert [linear.weight.data_ptr() for linear in linears] == before
    assert join([nn.Linear(20, 32, bias=False), linears[0]])


def test_a_conversion_takes_groups_apart_and_is_noticed():
    model = built("llama")
    vispec.join_projections(model)
    model.to(torch.bfloat16)
    assert are_joined(model) == {False}
    assert vispec.join_projections(model) == len(groups_of(model))


def test_one_weight_put_elsewhere_is_noticed():
    model = built("llama")
    vispec.join_projections(model)
    linears = groups_of(model)[0]
    linears[1].weight.data = linears[1].weight.data.clone()
    assert joined(linears) is None
    # Three neighbours in another order are no group either.
    assert joined([linears[0], linears[2]]) is None


def test_files_hold_what_they_held(tmp_path):
    model = built("qwen2")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    vispec.join_projections(model)
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").state_dict()
    tied = model.config.tie_word_embeddings
    state = {key: tensor for key, tensor in model.state_dict().items() if not (tied and key == "lm_head.weight")}
    save_file(state, tmp_path / "state.safetensors")
    written = load_file(tmp_path / "state.safetensors")
    for key, tensor in before.items():
        assert torch.equal(again[key], tensor), key
        assert key not in state or torch.equal(written[key], tensor), key
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in before.items())


def test_a_step_of_training_changes_what_it_changed_before():
    tokens = torch.randint(10, 40, (1, 9), generator=torch.Generator().manual_seed(3))
    models = [built("qwen2")]
    models.append(copy.deepcopy(models[0]))
    vispec.join_projections(models[1])
    for model in models:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    for (name, plain), together in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(plain, together, rtol=0, atol=0, msg=name)
    assert are_joined(models[1]) == {True}
