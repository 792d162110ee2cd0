"""Tiny random targets of every supported family, with inputs as a processor would make them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 151
IMAGE_TOKEN = 150
VIDEO_TOKEN = 149
VISION_START = 148
VISION_END = 147
EOS, PAD = 2, 0
PATCH = 14


def _text(**more: object) -> dict:
    return (
        dict(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            # Wide weights give logits that differ by whole units, so that rounding never decides a greedy token.
            initializer_range=0.3,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=EOS,
            tie_word_embeddings=False,
        )
        | more
    )


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=2 * PATCH,
        patch_size=PATCH,
        projection_dim=16,
        initializer_range=0.3,
    )


@dataclass
class Family:
    """One kind of target and the way its prompts are built."""

    name: str
    model: PreTrainedModel

    def prompt(self, images: int, seed: int, text: int = 9) -> dict[str, Tensor]:
        """A prompt of one row with so many images between runs of random text tokens."""
        generator = torch.Generator().manual_seed(seed)
        pieces, extras = [self._words(text, generator)], []
        for index in range(images):
            tokens, extra = self._image(index, generator)
            pieces += [tokens, self._words(text, generator)]
            extras.append(extra)
        tokens = torch.cat(pieces)[None]
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if extras:
            inputs.update(self._joined(extras))
        return self._finished(inputs)

    def batch(self, prompts: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
        """Prompts padded on one side into one batch."""
        longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
        tokens = torch.full((len(prompts), longest), PAD)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            length = prompt["input_ids"].shape[1]
            place = slice(longest - length, None) if side == "left" else slice(length)
            tokens[row, place] = prompt["input_ids"][0]
            mask[row, place] = 1
        inputs = {"input_ids": tokens, "attention_mask": mask}
        kept = [prompt for prompt in prompts if "pixel_values" in prompt]
        if kept:
            names = set(kept[0]) - {"input_ids", "attention_mask", "mm_token_type_ids"}
            inputs.update({name: torch.cat([prompt[name] for prompt in kept]) for name in names})
        return self._finished(inputs)

    def _words(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(3, VISION_END, (count,), generator=generator)

    def _image(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        raise AssertionError(f"{self.name} takes no images")

    def _joined(self, extras: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([extra[name] for extra in extras]) for name in extras[0]}

    def _finished(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs


class Llava(Family):
    def _image(self, index, generator):
        pixels = torch.randn(1, 3, 2 * PATCH, 2 * PATCH, generator=generator)
        return torch.full((4,), IMAGE_TOKEN), {"pixel_values": pixels}


class LlavaNext(Family):
    def _image(self, index, generator):
        # A square picture on the 2 x 2 grid: one overview patch, four tiles, and a newline token a row.
        side = 4 * PATCH
        pixels = torch.randn(1, 5, 3, 2 * PATCH, 2 * PATCH, generator=generator)
        tokens = 4 + 16 + 4
        return torch.full((tokens,), IMAGE_TOKEN), {
            "pixel_values": pixels,
            "image_sizes": torch.tensor([[side, side]]),
        }


class QwenVL(Family):
    def _image(self, index, generator):
        # Two shapes in turn; 2 x 2 patches are merged into one token.
        height, width = ((4, 6), (6, 4))[index % 2]
        pixels = torch.randn(height * width, 3 * 2 * PATCH * PATCH, generator=generator)
        inside = torch.full((height * width // 4,), IMAGE_TOKEN)
        tokens = torch.cat([torch.tensor([VISION_START]), inside, torch.tensor([VISION_END])])
        return tokens, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}

    def _finished(self, inputs):
        tokens = inputs["input_ids"]
        if "pixel_values" in inputs or "pixel_values_videos" in inputs:
            inputs["mm_token_type_ids"] = (tokens == IMAGE_TOKEN).int() + 2 * (tokens == VIDEO_TOKEN).int()
        return inputs

    def video_prompt(self, frames: int, seed: int) -> dict[str, Tensor]:
        """A prompt with one video of so many temporal patches, 2 x 2 merged tokens each."""
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(frames * 16, 3 * 2 * PATCH * PATCH, generator=generator)
        inside = torch.full((frames * 4,), VIDEO_TOKEN)
        start, end = torch.tensor([VISION_START]), torch.tensor([VISION_END])
        words = self._words(7, generator), self._words(7, generator)
        tokens = torch.cat([words[0], start, inside, end, words[1]])[None]
        return self._finished(
            {
                "input_ids": tokens,
                "attention_mask": torch.ones_like(tokens),
                "pixel_values_videos": pixels,
                "video_grid_thw": torch.tensor([[frames, 4, 4]]),
            }
        )


def build(name: str, seed: int = 0, **sizes: int) -> Family:
    """One family by name, with weights from a seed; `sizes` change those of its language model."""
    torch.manual_seed(seed)
    kind, model_class, config = _TABLE[name](_text(**sizes))
    model = model_class(config).float().eval()
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    return kind(name, model)


def _llama(text: dict):
    return Family, LlamaForCausalLM, LlamaConfig(**text)


def _qwen2(text: dict):
    return Family, Qwen2ForCausalLM, Qwen2Config(**text)


def _llava(text: dict):
    config = LlavaConfig(
        vision_config=_clip(),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return Llava, LlavaForConditionalGeneration, config


def _llava_next(text: dict):
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[4 * PATCH, 4 * PATCH]],
    )
    return LlavaNext, LlavaNextForConditionalGeneration, config


def _qwen2_5_vl(text: dict):
    eighth = text["hidden_size"] // text["num_attention_heads"] // 16
    sections = [2 * eighth, 3 * eighth, 3 * eighth]
    rope = {"rope_type": "default", "type": "default", "mrope_section": sections, "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope, "rope_scaling": None},
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=text["hidden_size"],
            patch_size=PATCH,
            window_size=4 * PATCH,
            fullatt_block_indexes=[1],
            initializer_range=0.3,
        ),
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return QwenVL, Qwen2_5_VLForConditionalGeneration, config


_TABLE = {
    "llama": _llama,
    "qwen2": _qwen2,
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_5_vl": _qwen2_5_vl,
}
FAMILIES = tuple(_TABLE)
VISION_FAMILIES = ("llava", "llava_next", "qwen2_5_vl")
