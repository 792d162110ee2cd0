"""Drafts whose rounds read weights rounded to int8: other proposals, the same answers."""

from __future__ import annotations

import pytest
import torch

import vispec
from tests import tiny
from tests.ops.conftest import available
from tests.test_draft import random_draft, started
from vispec.drafts.weights import Product, rounded
from vispec.ops import use_backend
from vispec.targets import load_target


@pytest.fixture(scope="module")
def family():
    return tiny.build("qwen2_5_vl")  # biases on queries, keys and values


@pytest.fixture
def draft(family):
    return random_draft(family.model)


def round_of(family, draft) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of three rows behind a prompt, as a catch-up pass predicts them, and the head's logits of them."""
    *_, session = started(family, draft, [family.prompt(1, seed=8)])
    runtime = session.runtime
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(2, 1, 3, draft.config.hidden_size, generator=generator)
    session.cache.begin(3)
    words = torch.tensor([[[1], [3], [7]]])
    with torch.inference_mode():
        hidden = runtime.rows(*rows, session._constant)
        features = draft(hidden, torch.tensor([[40, 41, 42]]), words, session.cache, runtime.layer)
        return features, runtime.head(features)


def test_a_round_differs_by_the_rounding_and_no_more(family, draft):
    plain = round_of(family, draft)
    draft.weights = "int8"
    for exact, found in zip(plain, round_of(family, draft), strict=True):
        error = float((found - exact).norm() / exact.norm())
        assert 1e-4 < error < 0.03


def test_the_prompt_is_read_with_the_weights_as_they_are(family, draft):
    *_, plain = started(family, draft, [family.prompt(1, seed=8)])
    draft.weights = "int8"
    *_, session = started(family, draft, [family.prompt(1, seed=8)])
    assert torch.equal(session._last, plain._last)
    assert torch.equal(session.cache.keys[0], plain.cache.keys[0])
    assert type(session.runtime.layer.mlp.up_proj) is Product and type(draft.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("graphs", (False, True))
@pytest.mark.parametrize("options", ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "seed": 5}))
def test_answers_are_the_same(family, draft, graphs, options):
    prompt = family.prompt(1, seed=8)
    expected = vispec.fast_generate(family.model, None, prompt, max_new_tokens=20, **options)
    draft.weights = "int8"
    found = vispec.fast_generate(
        family.model, draft, prompt, max_new_tokens=20, graphs=graphs, tree=vispec.TreeConfig(), **options
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_the_kernels_product_is_the_references(family, draft, dtype):
    available("emulated")
    layer = rounded(draft.layers[0].to(dtype), "int8")
    rows = torch.randn(2, 4, draft.config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for backend in ("reference", "emulated"):
        with use_backend(backend), torch.inference_mode():
            found.append(layer.mlp.up_proj(rows))
            assert found[-1].shape == (2, 4, draft.config.intermediate_size)
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=1e-3)
    draft.float()


def test_weights_are_rounded_anew_when_they_or_the_format_change(family, draft):
    target = load_target(family.model)
    plain = draft.runtime(target)
    draft.weights = "int8"
    first = draft.runtime(target)
    assert first is not plain and draft.runtime(target) is first
    with torch.no_grad():
        family.model.lm_head.weight.mul_(1)
    second = draft.runtime(target)
    assert second is not first, "the target's head"
    with torch.no_grad():
        draft.layers[0].mlp.up_proj.weight.mul_(2)
    third = draft.runtime(target)
    torch.testing.assert_close(third.layer.mlp.up_proj.scales, 2 * second.layer.mlp.up_proj.scales)


def test_files_know_nothing_of_it(family, draft, tmp_path):
    draft.weights = "int8"
    started(family, draft, [family.prompt(1, seed=8)])
    draft.save_pretrained(tmp_path)
    loaded = vispec.load_draft(tmp_path, target=family.model)
    assert loaded.weights is None
    for name, tensor in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert vispec.load_draft(tmp_path, target=family.model, weights="int8").weights == "int8"


def test_formats_that_cannot_be_are_refused(family, draft, tmp_path):
    draft.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights must be one of None, 'int8', got 'int4'"):
        vispec.load_draft(tmp_path, target=family.model, weights="int4")
    with pytest.raises(ValueError, match="weights must be None for prompt-lookup, which has none, got 'int8'"):
        vispec.load_draft("prompt-lookup", target=family.model, weights="int8")
    draft.weights = "fp4"
    with pytest.raises(ValueError, match="got 'fp4'"):
        draft.runtime(load_target(family.model))
