"""Families beyond the five of tests/tiny.py: the generic adapter answers like `generate`, or refuses by name."""

from __future__ import annotations

import pytest
import torch
import transformers

import vispec
from tests import tiny
from tests.replay import ReplayDraft

SIZES = {**tiny._text(), "max_position_embeddings": 256}
END = tiny.VISION_START
OPTIONS = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": END, "pad_token_id": tiny.PAD}

GPT_SIZES = dict(n_embd=64, n_layer=3, n_head=4, n_positions=256)
MLA_SIZES = dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    first_k_dense_replace=3,
    n_group=1,
    topk_group=1,
)
SERVED = {
    "GPT2": ("GPT2Config", "GPT2LMHeadModel", GPT_SIZES),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "OPT": ("OPTConfig", "OPTForCausalLM", dict(ffn_dim=96, word_embed_proj_dim=64)),
    "Falcon": ("FalconConfig", "FalconForCausalLM", {}),
    "Mistral": ("MistralConfig", "MistralForCausalLM", dict(sliding_window=None)),
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(sliding_window=None, num_local_experts=4)),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "Phi3": ("Phi3Config", "Phi3ForCausalLM", dict(sliding_window=None)),
    "OLMo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "Gemma": ("GemmaConfig", "GemmaForCausalLM", dict(head_dim=16)),
    "SmolLM3": ("SmolLM3Config", "SmolLM3ForCausalLM", dict(no_rope_layer_interval=2)),
    "GLM4": ("Glm4Config", "Glm4ForCausalLM", dict(head_dim=16)),
    "DeepSeek V3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", MLA_SIZES),
}
REFUSED = {
    "Bloom": ("BloomConfig", "BloomForCausalLM", dict(n_layer=3, n_head=4), r"\(ALiBi\) is not supported, got bloom"),
    "Falcon with ALiBi": ("FalconConfig", "FalconForCausalLM", dict(alibi=True), "ALiBi"),
    "Cohere": ("CohereConfig", "CohereForCausalLM", {}, "logit_scale must be 1.0, got 0.0625"),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM", dict(head_dim=16), "final_logit_softcapping must be None"),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(head_dim=16), "DynamicSlidingWindowLayer"),
    "Granite": ("GraniteConfig", "GraniteForCausalLM", dict(logits_scaling=2.0), "logits_scaling must be 1.0"),
    "RWKV": ("RwkvConfig", "RwkvForCausalLM", dict(attention_hidden_size=64), "must fill the cache it is given"),
    "BERT as decoder": ("BertConfig", "BertLMHeadModel", dict(is_decoder=True), "must give a tree the logits of plain"),
}


def text_model(config: str, model: str, sizes: dict):
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, **sizes})).float().eval()


def words(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, tiny.VISION_END, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SERVED)
def test_text_families_answer_like_generate(name):
    model = text_model(*SERVED[name])
    tokens = words(12, seed=1)[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(**inputs, **OPTIONS)
    replay = ReplayDraft({tuple(tokens[0].tolist()): expected[0, 12:].tolist()}, tiny.VOCABULARY, hit_rate=0.9)
    for draft in (None, replay):
        assert torch.equal(vispec.fast_generate(model, draft, inputs, tree=vispec.TreeConfig(), **OPTIONS), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_break_the_conventions_are_refused_by_name(name):
    *sizes, message = REFUSED[name]
    model = text_model(*sizes)
    tokens = words(8, seed=1)[None]
    with pytest.raises(ValueError, match=message):
        vispec.fast_generate(model, None, {"input_ids": tokens}, max_new_tokens=4)


ROPE = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
QWEN_TOKENS = dict(
    image_token_id=tiny.IMAGE_TOKEN,
    video_token_id=tiny.VIDEO_TOKEN,
    vision_start_token_id=tiny.VISION_START,
    vision_end_token_id=tiny.VISION_END,
)
SIGLIP = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)


def qwen_inputs() -> dict:
    family = tiny.QwenVL("qwen", None)
    return family.prompt(1, seed=1)


def inputs_with(picture_tokens: int, **pictures: torch.Tensor) -> dict:
    inside = torch.full((picture_tokens,), tiny.IMAGE_TOKEN)
    tokens = torch.cat([words(6, seed=1), inside, words(6, seed=2)])[None]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **pictures}


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def qwen2_vl():
    vision = dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, patch_size=tiny.PATCH, initializer_range=0.3)
    text = {**SIZES, "rope_parameters": ROPE}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    return transformers.Qwen2VLForConditionalGeneration(config), qwen_inputs()


def qwen3_vl():
    vision = dict(
        depth=3,
        hidden_size=32,
        out_hidden_size=64,
        intermediate_size=48,
        num_heads=2,
        patch_size=tiny.PATCH,
        initializer_range=0.3,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )
    text = {**SIZES, "head_dim": 16, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    return transformers.Qwen3VLForConditionalGeneration(config), qwen_inputs()


def llava_onevision():
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**SIGLIP),
        text_config=transformers.Qwen2Config(**SIZES),
        image_token_index=tiny.IMAGE_TOKEN,
        video_token_index=tiny.VIDEO_TOKEN,
        image_grid_pinpoints=[[56, 56]],
        vision_feature_layer=-1,
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    return model, inputs_with(4 + 16 + 4, pixel_values=pixels(1, 5, 3, 28, 28), image_sizes=torch.tensor([[56, 56]]))


def idefics3():
    config = transformers.Idefics3Config(
        vision_config={**SIGLIP, "patch_size": 7},
        text_config={**SIZES, "model_type": "llama"},
        image_token_id=tiny.IMAGE_TOKEN,
        scale_factor=2,
    )
    mask = torch.ones(1, 1, 28, 28, dtype=torch.int64)
    inputs = inputs_with(4, pixel_values=pixels(1, 1, 3, 28, 28), pixel_attention_mask=mask)
    return transformers.Idefics3ForConditionalGeneration(config), inputs


def internvl():
    config = transformers.InternVLConfig(
        vision_config={**SIGLIP, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config={**SIZES, "model_type": "qwen2"},
        image_token_id=tiny.IMAGE_TOKEN,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config), inputs_with(4, pixel_values=pixels(1, 3, 28, 28))


@pytest.mark.parametrize("build", (qwen2_vl, qwen3_vl, llava_onevision, idefics3, internvl))
def test_further_vision_families_answer_like_generate(build):
    torch.manual_seed(0)
    model, inputs = build()
    model = model.float().eval()
    expected = model.generate(**inputs, **OPTIONS)
    for draft in (None, vispec.ViSpecDraft.for_target(model)):
        assert torch.equal(vispec.fast_generate(model, draft, inputs, tree=vispec.TreeConfig(), **OPTIONS), expected)


def test_a_vision_family_that_reads_its_prompt_in_both_directions_is_refused():
    torch.manual_seed(0)
    config = transformers.PaliGemmaConfig(
        vision_config={**SIGLIP, "model_type": "siglip_vision_model", "projection_dim": 64},
        text_config={**SIZES, "model_type": "gemma", "head_dim": 16},
        image_token_index=tiny.IMAGE_TOKEN,
        projection_dim=64,
        hidden_size=64,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config).float().eval()
    inputs = inputs_with(4, pixel_values=pixels(1, 3, 28, 28))
    with pytest.raises(ValueError, match="PaliGemmaForConditionalGeneration must give a tree the logits of plain"):
        vispec.fast_generate(model, None, inputs, max_new_tokens=4)
