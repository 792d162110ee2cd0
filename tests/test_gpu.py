"""Whole answers on a CUDA device: the same equalities as on the CPU, with the CUDA kernels."""

from __future__ import annotations

import random

import pytest
import torch

import vispec
from tests import tiny
from tests.ops.conftest import REQUIRED
from tests.replay import DeviceReplayDraft, ReplayDraft
from vispec.decode import generate, replay
from vispec.decode.graph import LateEngine
from vispec.decode.shapes import MENU, AdaptiveShape
from vispec.targets.fused import FusedDecoder

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


@pytest.mark.parametrize("option", [{}, {"do_sample": True, "temperature": 1.4, "top_k": 40, "seed": 5}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [True, False])
def test_exact_self_gives_the_bits_of_plain_decoding(monkeypatch, fused, dtype, option):
    """Captured rounds and rounds that wait, in 16-bit formats, where any other sum would show."""
    if not fused:
        monkeypatch.setattr(FusedDecoder, "of", lambda decoder: None)
    family = tiny.build("qwen2_5_vl", hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    family.model.to("cuda", dtype)
    prompts = [family.prompt(1, seed=row, text=5 + 60 * row) for row in range(2)]
    keys = [tuple(prompt["input_ids"][0].tolist()) for prompt in prompts]
    batch = on_gpu(family.batch(prompts, "left"))
    batch = {name: part.to(dtype) if part.is_floating_point() else part for name, part in batch.items()}
    options = {"max_new_tokens": 40, "exact": "self", "eos_token_id": tiny.VOCABULARY + 1, **option}
    expected = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
    new = expected[:, batch["input_ids"].shape[1] :]
    known = ReplayDraft(dict(zip(keys, new.tolist(), strict=True)), tiny.VOCABULARY, hit_rate=0.95)
    late = DeviceReplayDraft(new, tiny.VOCABULARY, miss_every=6)
    for draft, tree in ((None, "auto"), (known, vispec.TreeConfig()), (late, vispec.TreeConfig()), (late, "auto")):
        assert torch.equal(vispec.fast_generate(family.model, draft, batch, tree=tree, **options), expected)


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


@pytest.fixture
def captures(monkeypatch) -> list:
    """Every graph that is captured from now on."""
    made = []
    capture = replay.capture
    monkeypatch.setattr(replay, "capture", lambda *args: (made.append(capture(*args)), made[-1])[1])
    return made


def some_prompts(family: tiny.Family, seed: int) -> dict:
    pictures = family.name in tiny.VISION_FAMILIES
    rows = [family.prompt((row + seed) % 2 if pictures else 0, seed=10 * seed + row) for row in range(2)]
    return on_gpu(family.batch(rows, "left"))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_rounds_are_captured_once_and_replayed_by_later_calls_with_the_same_tokens(name, sampled, captures):
    family = tiny.build(name)
    family.model.cuda()
    own = vispec.ViSpecDraft.for_target(family.model)
    for kind in ("none", "own", "true"):
        for seed in range(3):
            batch = some_prompts(family, seed)
            options = {"max_new_tokens": 40 + seed, "eos_token_id": tiny.VOCABULARY + seed}
            if sampled:
                options |= {"do_sample": True, "top_k": 20 + seed, "temperature": 1.0 + seed / 10, "seed": seed}
            answers = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
            new = answers[:, batch["input_ids"].shape[1] :]
            draft = {"none": None, "own": own, "true": DeviceReplayDraft(new, tiny.VOCABULARY, miss_every=4)}[kind]
            before = len(captures)
            for _ in range(2):
                actual = vispec.fast_generate(family.model, draft, batch, tree=vispec.TreeConfig(), **options)
                assert torch.equal(actual, answers)
            # A replay draft is another one for each answer.
            assert len(captures) - before == (seed == 0 or kind == "true")


def test_a_changed_model_is_captured_anew_and_one_changed_in_place_is_not(captures):
    family = tiny.build("llama")
    family.model.cuda()
    batch, options = some_prompts(family, 1), {"max_new_tokens": 24, "eos_token_id": tiny.VOCABULARY}
    layer = family.model.model.layers[1].mlp.down_proj

    def answer() -> int:
        expected = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
        assert torch.equal(vispec.fast_generate(family.model, None, batch, **options), expected)
        return len(captures)

    assert [answer(), answer()] == [1, 1]
    with torch.no_grad():
        layer.weight.neg_()
    assert answer() == 1
    layer.weight = torch.nn.Parameter(-2 * layer.weight.detach())
    assert answer() == 2
    vispec.release(family.model)
    assert answer() == 3


def test_released_rounds_give_their_memory_back():
    family = tiny.build("llama")
    family.model.cuda()
    options = {"max_new_tokens": 24, "eos_token_id": tiny.VOCABULARY}
    vispec.fast_generate(family.model, None, some_prompts(family, 1), graphs=False, **options)
    before = torch.cuda.memory_allocated()
    vispec.fast_generate(family.model, None, some_prompts(family, 1), **options)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated()
    vispec.release(family.model)
    # Libraries keep a workspace for the stream of captures.
    assert torch.cuda.memory_allocated() < kept
    assert kept > before


def test_rounds_on_another_stream_are_rounds_of_their_own(captures):
    family = tiny.build("llama")
    family.model.cuda()
    batch, options = some_prompts(family, 1), {"max_new_tokens": 24, "eos_token_id": tiny.VOCABULARY}
    expected = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    for _ in range(2):
        assert torch.equal(vispec.fast_generate(family.model, None, batch, **options), expected)
        with torch.cuda.stream(other):
            assert torch.equal(vispec.fast_generate(family.model, None, batch, **options), expected)
        torch.cuda.synchronize()
    assert len(captures) == 2


def test_captured_shapes_change_from_round_to_round_with_the_same_tokens(monkeypatch, captures):
    chance = random.Random(0)
    told = []

    class Forced(AdaptiveShape):
        def next(self, tokens_left, ready):
            return chance.choice(self.menu)

        def learn(self, shape, seconds, counts):
            told.append((shape, seconds))

    monkeypatch.setattr(generate, "AdaptiveShape", Forced)
    family = tiny.build("llava")
    family.model.cuda()
    batch, options = some_prompts(family, 1), {"max_new_tokens": 150, "eos_token_id": tiny.VOCABULARY}
    expected = vispec.fast_generate(family.model, None, batch, graphs=False, **options)
    draft = vispec.ViSpecDraft.for_target(family.model)
    for call in range(2):
        before = len(captures)
        assert torch.equal(vispec.fast_generate(family.model, draft, batch, **options), expected)
        assert len(captures) - before == (0 if call else len(MENU) + 1), "four shapes and the draft's catching up"
    timed = [seconds for _, seconds in told if seconds is not None]
    assert len(timed) > 100 and all(0 < seconds < 1 for seconds in timed)


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
