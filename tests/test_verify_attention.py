"""Verification with the tree-attention kernel inside Hugging Face decoders, on the emulator."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor

import vispec
from tests import tiny
from tests.ops.cases import tree_of
from tests.ops.conftest import available
from tests.test_families import MLA_SIZES, text_model, words
from vispec import ops
from vispec.cache import KeyValueCache
from vispec.ops import use_backend
from vispec.targets import Target, load_target, self_check
from vispec.targets import attention as verifying
from vispec.targets.fused import FusedDecoder
from vispec.tree import DraftTree

OF = FusedDecoder.of
# Heads of 64, two for one key-value head.
SIZES = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(autouse=True)
def emulated(request, monkeypatch):
    """What every other test here runs on; and the decoders' own layers, as they serve families that are not fused."""
    if "kernels" not in request.fixturenames:
        available("emulated")
    monkeypatch.setattr(FusedDecoder, "of", lambda decoder: None)


def half_model(name: str, **sizes: int) -> tiny.Family:
    family = tiny.build(name, **{**SIZES, **sizes})
    family.model.bfloat16()
    return family


def prompts(family: tiny.Family) -> dict[str, Tensor]:
    """Three rows of different lengths."""
    images = 1 if family.name in tiny.VISION_FAMILIES else 0
    return family.batch([family.prompt(images, seed=row, text=5 + 40 * row) for row in range(3)], "left")


@torch.inference_mode()
def verified(model, inputs: dict, tree: DraftTree, passes: int = 1) -> list[Tensor]:
    """Float32 logits [B, T, V] of every pass over the same tree behind the same prompt."""
    target = load_target(model)
    inputs = {
        name: value.to(target.device, target.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    for name in ("tokens", "parents", "depths", "ancestors", "scores"):
        setattr(tree, name, getattr(tree, name).to(target.device))
    with target.session():
        read = target.prefill(inputs)
        return [target.verify(tree, read.next_positions, read.cache)[0].float() for _ in range(passes)]


class Calls:
    """Counts calls of the op that attention functions reach."""

    def __init__(self, monkeypatch) -> None:
        self.count = 0
        real = ops.tree_attention

        def counted(*arguments, **named):
            self.count += 1
            real(*arguments, **named)

        monkeypatch.setattr(ops, "tree_attention", counted)


@pytest.mark.parametrize("T", [1, 30, 65])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_logits_are_as_good_as_those_of_sdpa(kernels, monkeypatch, name, T):
    """Errors against float32 of the kernel's logits and of PyTorch's, on a ragged batch."""
    family = half_model(name)
    family.model.to(kernels.device)
    inputs, tree = prompts(family), tree_of(3, T, tiny.VISION_END)
    with use_backend("reference"):
        (plain,) = verified(family.model, inputs, tree)
        (exact,) = verified(copy.deepcopy(family.model).float(), inputs, tree)
    calls = Calls(monkeypatch)
    with use_backend(None if kernels.name == "cuda" else kernels.name):
        (ours,) = verified(family.model, inputs, tree)
    assert calls.count == 3  # layers
    error, bound = (ours - exact).square().mean().sqrt(), (plain - exact).square().mean().sqrt()
    assert 0 < float(error) <= 2 * float(bound)
    assert float((ours - exact).abs().max()) <= 2 * float((plain - exact).abs().max())


def test_the_dense_mask_is_built_once(monkeypatch):
    family = half_model("llama")
    inputs, tree = prompts(family), tree_of(3, 30, tiny.VISION_END)
    masks = 0
    real = KeyValueCache.mask

    def counted(*arguments):
        nonlocal masks
        masks += 1
        return real(*arguments)

    monkeypatch.setattr(KeyValueCache, "mask", counted)
    with use_backend("emulated"):
        first, second, third = verified(family.model, inputs, tree, passes=3)
    assert masks == 1
    assert torch.equal(first, second) and torch.equal(second, third)


def test_nothing_changes_on_the_cpu(monkeypatch):
    """Without the forced backend a bfloat16 model runs PyTorch's attention, in every pass."""
    family = half_model("llava")
    calls = Calls(monkeypatch)
    target = load_target(family.model)
    verified(target, prompts(family), tree_of(3, 9, tiny.VISION_END), passes=2)
    assert calls.count == 0 and target.needs_mask


def test_a_backend_may_change_between_passes():
    family = half_model("qwen2")
    inputs, tree = prompts(family), tree_of(3, 12, tiny.VISION_END)
    expected = verified(family.model, inputs, tree)[0]
    target = load_target(family.model)
    with use_backend("emulated"):
        verified(target, inputs, tree)
    assert not target.needs_mask
    assert torch.equal(verified(target, inputs, tree)[0], expected)
    assert target.needs_mask


@pytest.mark.parametrize(
    ("config", "model", "sizes", "dtype"),
    [
        ("LlamaConfig", "LlamaForCausalLM", SIZES, torch.float32),  # no kernel for float32
        ("LlamaConfig", "LlamaForCausalLM", {}, torch.bfloat16),  # heads of 16
        ("FalconConfig", "FalconForCausalLM", SIZES, torch.bfloat16),  # not by the registry: reads the mask itself
        ("DeepseekV3Config", "DeepseekV3ForCausalLM", MLA_SIZES, torch.bfloat16),  # keys and values of different widths
    ],
)
def test_other_models_keep_pytorch_and_their_mask(monkeypatch, config, model, sizes, dtype):
    made = text_model(config, model, sizes).to(dtype)
    tokens = words(12, seed=1)[None]
    inputs, tree = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tree_of(1, 9, tiny.VISION_END)
    expected = verified(made, inputs, tree)[0]
    calls = Calls(monkeypatch)
    with use_backend("emulated"):
        for got in verified(made, inputs, tree, passes=2):
            assert torch.equal(got, expected)
    assert calls.count == 0


def layer_call(monkeypatch, change: str | None, **extras: object) -> tuple[int, Tensor, Tensor]:
    """One layer's attention inside a pass without a dense mask: calls of the op, the output, and SDPA's own."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    cache = KeyValueCache.allocate(2, 2, 1, 64, 40, like=draw(1))
    cache.begin(7)
    cache.update(draw(2, 1, 7, 64), draw(2, 1, 7, 64), 1)
    cache.advance(torch.tensor([7, 4]), [7, 4])
    tree = tree_of(2, 5, tiny.VISION_END)
    cache.begin(5)
    key, value = cache.update(draw(2, 1, 5, 64), draw(2, 1, 5, 64), 1)
    query = draw(2, 2, 5, 64)
    tree_pass = verifying.TreePass(cache, tree, torch.bfloat16, dense=False)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=tree_pass.dense_mask, enable_gqa=True, scale=0.3
    )
    module = torch.nn.Module()
    module.layer_idx = None if change == "layer" else 1
    if change == "copied keys":
        key = key.clone()
    if change == "repeated heads":
        key, value = key.expand(-1, 2, -1, -1), value.expand(-1, 2, -1, -1)
    if change == "values of another layer":
        value = cache.values[0][:, :, : value.shape[2]]
        expected = torch.zeros_like(expected)
    mask = tree_pass.dense_mask + 0 if change == "mask" else tree_pass.mask
    calls = Calls(monkeypatch)
    config = transformers.LlamaConfig(attn_implementation="eager")
    with use_backend("emulated"), verifying.attention_of(config, tree_pass):
        assert config._attn_implementation == verifying.NAME
        output, weights = verifying.tree_attention(module, query, key, value, mask, scaling=0.3, **extras)
    assert config._attn_implementation == "eager" and weights is None
    return calls.count, output, expected.transpose(1, 2)


def test_a_layer_that_fits(monkeypatch):
    calls, output, expected = layer_call(monkeypatch, None, sliding_window=None, position_ids=torch.arange(5))
    assert calls == 1
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("change", "extras"),
    [
        ("layer", {}),
        ("copied keys", {}),
        ("repeated heads", {}),
        ("values of another layer", {}),
        ("mask", {}),
        *((None, {name: 4}) for name in verifying.BEYOND_SOFTMAX if name != "softcap"),
    ],
)
def test_layers_that_ask_for_more_keep_pytorch(monkeypatch, change, extras):
    calls, output, expected = layer_call(monkeypatch, change, **extras)
    assert calls == 0
    assert torch.equal(output, expected)


def test_a_soft_cap_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="softcap must be None, got 4"):
        layer_call(monkeypatch, None, softcap=4)


def test_nothing_is_left_after_an_error():
    family = half_model("llama")
    target = load_target(family.model)
    config = target.decoder.config
    own = config._attn_implementation

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("in the middle")

    read = target.prefill(prompts(family))
    handle = target.decoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        target.verify(tree_of(3, 4, tiny.VISION_END), read.next_positions, read.cache)
    handle.remove()
    assert config._attn_implementation == own and verifying._running.get() is None


def untested_family() -> tuple[Target, dict]:
    sizes = {**SIZES, "sliding_window": None}
    model = text_model("MistralConfig", "MistralForCausalLM", sizes).bfloat16()
    tokens = words(12, seed=1)[None]
    return load_target(model), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_the_self_check_covers_passes_without_a_mask(monkeypatch):
    target, inputs = untested_family()
    calls = Calls(monkeypatch)
    with use_backend("emulated"), torch.inference_mode():
        self_check(target, inputs)
    assert calls.count == 2 * 3


def test_a_decoder_that_reads_the_mask_elsewhere_is_refused(monkeypatch):
    """Its attention does without the mask, the rest does not: NaN of the stand-in must not pass for logits."""
    target, inputs = untested_family()

    def read_mask(module: object, args: tuple, kwargs: dict, output):
        if kwargs["attention_mask"] is not None and kwargs["attention_mask"].dim() == 4:
            output.last_hidden_state = output.last_hidden_state + 0 * kwargs["attention_mask"].amax()
        return output

    target.decoder.register_forward_hook(read_mask, with_kwargs=True)
    with (
        use_backend("emulated"),
        torch.inference_mode(),
        pytest.raises(ValueError, match="must give a tree the logits of plain decoding"),
    ):
        self_check(target, inputs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_greedy_generation_from_end_to_end(monkeypatch, name, fused):
    """Every token of a ragged batch is the float32 model's best, or within the rounding of a bfloat16 pass of it."""
    if fused:
        monkeypatch.setattr(FusedDecoder, "of", OF)
    family = half_model(name)
    inputs = prompts(family)
    floats = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    draft = vispec.ViSpecDraft.for_target(family.model)
    calls = Calls(monkeypatch)
    with use_backend("emulated"):
        answers = vispec.fast_generate(family.model, draft, floats, max_new_tokens=12)
    assert calls.count >= 3 * 3
    start = inputs["input_ids"].shape[1]
    exact = copy.deepcopy(family.model).float()
    for row in range(3):
        prompt = family.prompt(1, seed=row, text=5 + 40 * row)
        new = answers[row, start:].tolist()
        new = new[: new.index(tiny.EOS) + 1] if tiny.EOS in new else new
        length = prompt["input_ids"].shape[1]
        prompt["input_ids"] = torch.cat([prompt["input_ids"], torch.tensor([new])], dim=1)
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
        prompt = family._finished(prompt)
        with torch.no_grad():
            logits = exact(**prompt).logits[0, length - 1 : -1]
            rough = family.model(
                **{key: value.bfloat16() if value.is_floating_point() else value for key, value in prompt.items()}
            ).logits[0, length - 1 : -1]
        rounding = float((rough.float() - logits).abs().max())
        short = logits.amax(-1) - logits.gather(-1, torch.tensor(new)[:, None])[:, 0]
        assert float(short.max()) <= 2 * rounding, (row, new)
        assert float((logits.argmax(-1) == torch.tensor(new)).float().mean()) > 0.8
