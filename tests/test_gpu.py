"""Whole answers on a CUDA device: the same equalities as on the CPU, with the CUDA kernels."""

from __future__ import annotations

import pytest
import torch

import vispec
from tests import tiny
from tests.ops.conftest import REQUIRED
from tests.replay import ReplayDraft

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_float32():
    """Needs a device; TF32 would round float32 matmuls to 10 bits and decide greedy tokens by chance."""
    if not torch.cuda.is_available():
        if "cuda" in REQUIRED:
            pytest.fail("VISPEC_TEST_REQUIRE names cuda, but there is no CUDA device")
        pytest.skip("no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def on_gpu(inputs: dict) -> dict:
    return {name: value.cuda() for name, value in inputs.items()}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_greedy_speculation_equals_generate(name):
    family = tiny.build(name)
    family.model.cuda()
    inputs = on_gpu(family.prompt(2 if name in tiny.VISION_FAMILIES else 0, seed=3))
    expected = family.model.generate(**inputs, max_new_tokens=32, do_sample=False)
    new = expected[0, inputs["input_ids"].shape[1] :].tolist()
    replay = ReplayDraft({tuple(inputs["input_ids"][0].tolist()): new}, tiny.VOCABULARY, hit_rate=0.8)
    for draft in (None, vispec.ViSpecDraft.for_target(family.model), replay):
        assert torch.equal(vispec.fast_generate(family.model, draft, inputs, max_new_tokens=32), expected)


@pytest.mark.parametrize("name", tiny.VISION_FAMILIES)
def test_a_ragged_batch_equals_its_rows_alone(name):
    family = tiny.build(name)
    family.model.cuda()
    prompts = [family.prompt(row % 2, seed=10 + row, text=5 + 3 * row) for row in range(4)]
    draft = vispec.ViSpecDraft.for_target(family.model)
    batch = on_gpu(family.batch(prompts, "left"))
    together = vispec.fast_generate(family.model, draft, batch, max_new_tokens=24)
    for row, prompt in enumerate(prompts):
        prompt = on_gpu(prompt)
        alone = family.model.generate(**prompt, max_new_tokens=24, do_sample=False)
        new = alone[0, prompt["input_ids"].shape[1] :].tolist()
        assert together[row, batch["input_ids"].shape[1] :].tolist()[: len(new)] == new


def test_a_seed_gives_the_cpus_tokens():
    """The same logits and seed give the same draw on every backend; float32 logits are close enough to agree."""
    family = tiny.build("llava")
    inputs = family.prompt(1, seed=3)
    options = {"max_new_tokens": 24, "do_sample": True, "top_k": 20, "top_p": 0.9, "seed": 11}
    expected = vispec.fast_generate(family.model, None, inputs, **options)
    family.model.cuda()
    draft = vispec.ViSpecDraft.for_target(family.model)
    actual = vispec.fast_generate(family.model, draft, on_gpu(inputs), **options)
    assert torch.equal(actual.cpu(), expected)
