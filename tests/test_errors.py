"""Bad input gets a clear error before any work, and leaves nothing changed."""

from __future__ import annotations

import hashlib
import json
import pickle

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import vispec
from tests import tiny

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def built(name: str) -> tiny.Family:
    """A family whose model has run once: transformers hangs its own hooks on a model's first forward pass."""
    family = tiny.build(name)
    family.model.generate(**family.prompt(1 if name in tiny.VISION_FAMILIES else 0, seed=0), max_new_tokens=2)
    return family


def fingerprint(model) -> tuple:
    """Everything about a model that a call might leave changed."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    ]
    attention = [
        module.config._attn_implementation for module in model.modules() if getattr(module, "config", None) is not None
    ]
    attributes = sorted(vars(model)) + sorted(vars(getattr(model, "model", model)))
    delta = getattr(getattr(model, "model", None), "rope_deltas", None)
    return (
        digest.hexdigest(),
        hooks,
        attention,
        attributes,
        model.training,
        model.generation_config.to_json_string(),
        model.config.to_json_string(),
        None if delta is None else delta.tolist(),
        [parameter.requires_grad for parameter in model.parameters()],
    )


@pytest.fixture(scope="module")
def llava():
    return built("llava")


@pytest.fixture(scope="module")
def draft(llava):
    torch.manual_seed(1)
    return vispec.ViSpecDraft.for_target(llava.model)


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("training", (False, True))
def test_the_model_is_untouched(name, training):
    family = built(name)
    family.model.train(training)
    inputs = family.prompt(1 if name in tiny.VISION_FAMILIES else 0, seed=3)
    draft = vispec.ViSpecDraft.for_target(family.model)
    before = fingerprint(family.model)
    vispec.fast_generate(family.model, draft, inputs, max_new_tokens=6)
    assert fingerprint(family.model) == before


@pytest.mark.parametrize("error", (KeyboardInterrupt, RuntimeError))
@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl"))
def test_the_model_is_untouched_and_usable_after_an_exception(name, error):
    family = built(name)
    inputs = family.prompt(1, seed=3)
    draft = vispec.ViSpecDraft.for_target(family.model)
    expected = family.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    family.model.train()
    before = fingerprint(family.model)
    rounds = []

    def interrupt(event) -> None:
        rounds.append(event)
        if len(rounds) == 3:
            raise error("stop")

    with pytest.raises(error):
        vispec.fast_generate(family.model, draft, inputs, max_new_tokens=8, on_round=interrupt)
    assert fingerprint(family.model) == before
    actual = vispec.fast_generate(family.model, draft, inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("where", ("decoder", "vision_tower"))
def test_an_exception_inside_the_model_leaves_it_untouched(where):
    family = built("llava")
    inner = family.model.model
    module = inner.vision_tower if where == "vision_tower" else inner.language_model.layers[1]
    draft = vispec.ViSpecDraft.for_target(family.model)
    inputs = family.prompt(1, seed=3)
    before = fingerprint(family.model)

    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        vispec.fast_generate(family.model, draft, inputs, max_new_tokens=8)
    handle.remove()
    assert fingerprint(family.model) == before


OPTIONS = (
    ({"num_beams": 4}, "num_beams must be one of"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha must be one of"),
    ({"num_return_sequences": 2}, "num_return_sequences"),
    ({"typical_p": 0.5}, "typical_p"),
    ({"max_new_token": 4}, "unknown option max_new_token; known: bad_words_ids"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"max_length": 3}, "max_new_tokens must be at least 1"),
    ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ({"top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
    ({"top_k": -1}, "top_k must be an integer of at least 0, got -1"),
    ({"min_p": -0.1}, "min_p must be in"),
    ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
    ({"max_new_tokens": 500}, r"prompt \+ max_new_tokens must be at most the model's 512 positions, got 22 \+ 500"),
    ({"do_sample": True, "seed": [1, 2, 3]}, "seed must be one number or 1, got 3"),
)


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options_that_cannot_be_served(llava, draft, options, message):
    inputs = llava.prompt(1, seed=3)
    before = fingerprint(llava.model)
    with pytest.raises(ValueError, match=message):
        vispec.fast_generate(llava.model, draft, inputs, **options)
    assert fingerprint(llava.model) == before


def test_unsupported_settings_in_the_models_own_config(draft):
    family = built("llava")
    family.model.generation_config.num_beams = 3
    with pytest.raises(ValueError, match="num_beams"):
        vispec.fast_generate(family.model, draft, family.prompt(1, seed=3), max_new_tokens=3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    (
        ({"total_tokens": 257}, r"total_tokens must be in \[1, 256\], got 257"),
        ({"top_k": 17}, r"top_k must be in \[1, 16\], got 17"),
        ({"depth": -1}, "depth must be in"),
        ({"depth": 2.0}, "depth must be an integer, got 2.0"),
    ),
)
def test_trees_that_are_too_large(sizes, message):
    with pytest.raises(ValueError, match=message):
        vispec.TreeConfig(**sizes)


def test_a_prompt_that_is_empty(llava, draft):
    for inputs in (
        {"input_ids": torch.empty(1, 0, dtype=torch.int64)},
        {"input_ids": torch.tensor([[5, 6], [0, 0]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
    ):
        with pytest.raises(ValueError, match="prompt must not be empty"):
            vispec.fast_generate(llava.model, draft, inputs, max_new_tokens=3)


def test_inputs_of_the_wrong_kind(llava, draft):
    with pytest.raises(ValueError, match="inputs must hold input_ids, got str"):
        vispec.fast_generate(llava.model, draft, "hello")
    with pytest.raises(ValueError, match=r"input_ids must be int64 \[B, S\], got \(3,\)"):
        vispec.fast_generate(llava.model, draft, {"input_ids": torch.tensor([1, 2, 3])})
    with pytest.raises(ValueError, match="attention_mask must be"):
        vispec.fast_generate(
            llava.model, draft, {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 3)}
        )


def test_a_streamer_with_a_batch(llava, draft):
    inputs = llava.batch([llava.prompt(0, seed=1), llava.prompt(0, seed=2)], "left")
    with pytest.raises(ValueError, match="a streamer takes batch 1, got 2"):
        vispec.fast_generate(llava.model, draft, inputs, streamer=object())


@pytest.mark.parametrize("name", tiny.VISION_FAMILIES)
def test_image_tokens_that_do_not_match_the_features(name):
    family = built(name)
    inputs = family.prompt(1, seed=3)
    tokens = inputs["input_ids"].clone()
    place = int(torch.nonzero(tokens[0] == tiny.IMAGE_TOKEN)[0])
    tokens[0, place] = 5
    before = fingerprint(family.model)
    draft = vispec.ViSpecDraft.for_target(family.model)
    with pytest.raises((ValueError, RuntimeError), match="(?i)image"):
        vispec.fast_generate(family.model, draft, {**inputs, "input_ids": tokens}, max_new_tokens=3)
    assert fingerprint(family.model) == before


def test_a_draft_made_for_another_target(llava):
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    for change, message in (
        ({"hidden_size": 64}, "hidden_size must be 32 .*got 64"),
        ({"vocab_size": 65}, "vocab_size must be 64 .*got 65"),
    ):
        other = LlamaForCausalLM(LlamaConfig(**{**SMALL, **change})).eval()
        draft = vispec.ViSpecDraft.for_target(other)
        with pytest.raises(ValueError, match=f"made for another target: {message}"):
            vispec.fast_generate(model, draft, inputs, max_new_tokens=3)


@pytest.mark.parametrize(
    ("build", "message"),
    (
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)), "DynamicSlidingWindowLayer"),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)),
            "LinearAttentionLayer|recurrent",
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
            ),
            "encoder-decoder models are not supported, got T5ForConditionalGeneration",
        ),
        (lambda: torch.nn.Linear(2, 2), "model must be a Hugging Face language model, got Linear"),
    ),
    ids=("sliding window", "recurrent", "encoder-decoder", "not a model"),
)
def test_models_that_are_not_supported(build, message):
    with pytest.raises(ValueError, match=message):
        vispec.fast_generate(build(), None, {"input_ids": torch.tensor([[1, 2, 3]])}, max_new_tokens=3)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_logits_that_are_not_finite_name_the_round(llava, draft, value):
    family = built("llava")
    inputs = family.prompt(1, seed=3)
    calls = []

    def poison(module, arguments, output):
        calls.append(None)
        return output * value if len(calls) == 4 else output

    handle = family.model.lm_head.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match="not finite in round 2"):
        vispec.fast_generate(family.model, None, inputs, max_new_tokens=10)
    handle.remove()


def saved(draft, folder):
    draft.save_pretrained(folder)
    return folder


def test_a_saved_draft_comes_back_the_same(llava, draft, tmp_path):
    folder = saved(draft, tmp_path / "draft")
    loaded = vispec.load_draft(folder, target=llava.model)
    assert loaded.config == draft.config
    for (name, old), new in zip(draft.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(old, new), name
    inputs = llava.prompt(1, seed=3)
    old, new = (
        vispec.fast_generate(
            llava.model, d, inputs, max_new_tokens=9, return_dict_in_generate=True, tree=vispec.TreeConfig()
        )
        for d in (draft, loaded)
    )
    assert old.stats.accepted_per_round == new.stats.accepted_per_round


def test_a_reduced_head_comes_back_and_proposes_only_its_tokens(llava, tmp_path):
    draft = vispec.ViSpecDraft.for_target(llava.model)
    allowed = [3, 5, 8, 13, 21, 34, 55, 89, 144]
    draft.head_tokens = torch.tensor(allowed)
    loaded = vispec.load_draft(saved(draft, tmp_path / "draft"), target=llava.model)
    assert loaded.head_tokens.tolist() == allowed
    inputs = llava.prompt(1, seed=3)
    proposed = set()
    actual = vispec.fast_generate(
        llava.model,
        loaded,
        inputs,
        max_new_tokens=9,
        do_sample=False,
        tree=vispec.TreeConfig(depth=3, top_k=8),
        on_round=lambda event: proposed.update(event.tree.tokens[0, 1:].tolist()) if event.tree else None,
    )
    assert proposed and proposed <= set(allowed)
    assert torch.equal(actual, llava.model.generate(**inputs, max_new_tokens=9, do_sample=False))


def test_checkpoints_that_cannot_be_read(llava, draft, tmp_path):
    folder = saved(draft, tmp_path / "draft")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    with pytest.raises(FileNotFoundError, match="must be a folder or a hub id"):
        vispec.load_draft(tmp_path / "nowhere", target=llava.model)
    with pytest.raises(FileNotFoundError, match="no/where must be a folder or a repository of the hub, got neither"):
        vispec.load_draft("no/where", target=llava.model, local_files_only=True)
    with pytest.raises(FileNotFoundError, match="must hold config.json"):
        vispec.load_draft(tmp_path, target=llava.model)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        vispec.load_draft(folder, target=llava.model)
    weights.write_bytes(b"\x00" * 64)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        vispec.load_draft(folder, target=llava.model)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors or pytorch_model.bin"):
        vispec.load_draft(folder, target=llava.model)


class Malicious:
    """Pickles to a call."""

    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_checkpoint_is_loaded_as_tensors_or_refused(llava, draft, tmp_path, capsys):
    folder = saved(draft, tmp_path / "draft")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    tensors = {name: tensor for name, tensor in draft.state_dict().items() if name != "head_tokens"}
    torch.save({**tensors, "embed_tokens.weight": llava.model.get_input_embeddings().weight}, file)
    assert vispec.load_draft(folder, target=llava.model).config == draft.config
    torch.save({**tensors, "extra": Malicious()}, file)
    with pytest.raises(ValueError, match="must hold plain tensors and nothing else"):
        vispec.load_draft(folder, target=llava.model)
    file.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="must hold plain tensors and nothing else"):
        vispec.load_draft(folder, target=llava.model)
    assert "executed" not in capsys.readouterr().out


def test_tensors_that_are_missing_left_over_or_of_the_wrong_shape(llava, draft, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved(draft, tmp_path / "draft")
    file = folder / "model.safetensors"
    tensors = load_file(file)

    def write(**changes) -> None:
        kept = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
        save_file(kept, file)

    for changes, message in (
        ({"imadpt.o_proj.weight": None}, r"missing \['imadpt.o_proj.weight'\]"),
        ({"layers.1.mlp.gate_proj.weight": torch.ones(2, 2)}, r"unknown \['layers.1.mlp.gate_proj.weight'\]"),
        ({"fc.weight": None}, "must hold the tensor fc.weight"),
        ({"img_fc.weight": torch.zeros(3, 3)}, r"img_fc.weight must be \(64, 128\), got \(3, 3\)"),
        ({"fc.bias": torch.full((64,), float("nan"))}, "fc.bias must be finite"),
        ({"head_tokens": torch.tensor([3, 3])}, "head_tokens must be a list of different token ids"),
        ({"head_tokens": torch.tensor([3, 4000])}, "head_tokens must lie in"),
        ({"embed_tokens.weight": torch.ones(7, 64)}, "embed_tokens.weight must be"),
    ):
        write(**changes)
        with pytest.raises(ValueError, match=message):
            vispec.load_draft(folder, target=llava.model)
    write()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text("{" + json.dumps(config))
    with pytest.raises(ValueError, match="must be JSON"):
        vispec.load_draft(folder, target=llava.model)
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json must give hidden_size, got None"):
        vispec.load_draft(folder, target=llava.model)


@pytest.mark.parametrize("bias", (True, False))
def test_a_text_only_eagle_checkpoint_drafts(tmp_path, bias):
    """EAGLE-1/2 layout: no adaptor, no img_fc, grouped key-value heads, `fc` with or without bias."""
    from safetensors.torch import save_file

    family = built("llava")
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    tensors = {
        "embed_tokens.weight": random(tiny.VOCABULARY, 64),
        "fc.weight": random(64, 128),
        "layers.0.self_attn.q_proj.weight": random(64, 64),
        "layers.0.self_attn.k_proj.weight": random(32, 64),
        "layers.0.self_attn.v_proj.weight": random(32, 64),
        "layers.0.self_attn.o_proj.weight": random(64, 64),
        "layers.0.mlp.gate_proj.weight": random(96, 64),
        "layers.0.mlp.up_proj.weight": random(96, 64),
        "layers.0.mlp.down_proj.weight": random(64, 96),
        "layers.0.post_attention_layernorm.weight": torch.ones(64),
    }
    if bias:
        tensors["fc.bias"] = random(64)
    save_file(tensors, tmp_path / "model.safetensors")
    config = dict(model_type="llama", hidden_size=64, num_attention_heads=4, vocab_size=tiny.VOCABULARY)
    (tmp_path / "config.json").write_text(json.dumps(config))
    draft = vispec.load_draft(tmp_path, target=family.model)
    assert draft.config.num_queries == 0 and draft.config.num_key_value_heads == 2
    for images in (0, 2):
        inputs = family.prompt(images, seed=3)
        expected = family.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert torch.equal(
            vispec.fast_generate(family.model, draft, inputs, max_new_tokens=16, tree=vispec.TreeConfig()), expected
        )
