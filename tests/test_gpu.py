"""Whole answers on a CUDA device: the same equalities as on the CPU, with the CUDA kernels."""

from __future__ import annotations

import pytest
import torch

import vispec
from tests import tiny
from tests.ops.conftest import REQUIRED
from tests.replay import DeviceReplayDraft, ReplayDraft
from vispec.decode.graph import LateEngine, Replayed

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
        assert torch.equal(
            vispec.fast_generate(family.model, draft, inputs, max_new_tokens=32, tree=vispec.TreeConfig()), expected
        )


@pytest.mark.parametrize("name", tiny.VISION_FAMILIES)
def test_a_ragged_batch_equals_its_rows_alone(name):
    family = tiny.build(name)
    family.model.cuda()
    prompts = [family.prompt(row % 2, seed=10 + row, text=5 + 3 * row) for row in range(4)]
    draft = vispec.ViSpecDraft.for_target(family.model)
    batch = on_gpu(family.batch(prompts, "left"))
    together = vispec.fast_generate(family.model, draft, batch, max_new_tokens=24, tree=vispec.TreeConfig())
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
    actual = vispec.fast_generate(family.model, draft, on_gpu(inputs), tree=vispec.TreeConfig(), **options)
    assert torch.equal(actual.cpu(), expected)


def captured_rounds(monkeypatch) -> list[Replayed]:
    """Every `Replayed` that is made from now on."""
    made = []
    start = Replayed.__init__
    monkeypatch.setattr(Replayed, "__init__", lambda self, *args: (made.append(self), start(self, *args))[1])
    return made


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_rounds_are_replayed_from_a_graph_with_the_same_tokens(name, sampled, monkeypatch):
    family = tiny.build(name)
    family.model.cuda()
    prompts = [family.prompt(row % 2 if name in tiny.VISION_FAMILIES else 0, seed=10 + row) for row in range(2)]
    batch = on_gpu(family.batch(prompts, "left"))
    options = {"max_new_tokens": 40, **({"do_sample": True, "top_k": 20, "seed": 3} if sampled else {})}
    answers = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
    true = DeviceReplayDraft(answers[:, batch["input_ids"].shape[1] :], tiny.VOCABULARY, miss_every=4)
    for draft in (None, vispec.ViSpecDraft.for_target(family.model), true):
        made = captured_rounds(monkeypatch)
        assert torch.equal(vispec.fast_generate(family.model, draft, batch, **options), answers)
        assert [replayed.captured for replayed in made] == [True]


def test_a_replayed_round_never_waits_for_the_device(monkeypatch):
    family = tiny.build("llava")
    family.model.cuda()
    inputs = on_gpu(family.prompt(1, seed=3))
    replays = []
    replay, step = torch.cuda.CUDAGraph.replay, LateEngine.step

    def strict_replay(self):
        replays.append(1)
        torch.cuda.set_sync_debug_mode("error")
        replay(self)

    def strict_step(self):
        try:
            return step(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", strict_replay)
    monkeypatch.setattr(LateEngine, "step", strict_step)
    vispec.fast_generate(family.model, vispec.ViSpecDraft.for_target(family.model), inputs, max_new_tokens=24)
    assert len(replays) > 10


def test_a_model_that_cannot_be_captured_says_so_and_answers_the_same():
    family = tiny.build("llama")
    family.model.cuda()
    inputs = on_gpu(family.prompt(0, seed=3))
    expected = vispec.fast_generate(family.model, None, inputs, graphs=False, max_new_tokens=24)

    def read_back(module, args, output):
        args[0].sum().item()

    handle = family.model.model.layers[0].register_forward_hook(read_back)
    try:
        with pytest.warns(UserWarning, match="cannot be captured"):
            actual = vispec.fast_generate(family.model, None, inputs, max_new_tokens=24)
    finally:
        handle.remove()
    assert torch.equal(actual, expected)
