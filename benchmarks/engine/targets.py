"""Full-size targets with random weights made on the device: the shapes that count for speed, and no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """One target.

    Attributes:
        layers, hidden, intermediate, heads, groups, head_width, vocabulary: of its language model.
        family: the config's model type.
        tau: drafted tokens accepted a round as published for ViSpec at temperature 0 (depth 3, top_k 8, 30 nodes).
        picture_rows: rows of one picture: five tiles of 336 x 336 pixels (LLaVA-1.6), 896 x 896 pixels (Qwen2.5-VL).
        tied: whether the head is the embedding.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: int
    vocabulary: int
    family: str
    tau: float
    picture_rows: int
    tied: bool = False
    head_width: int = 128

    def config(self) -> Any:
        """The family's configuration with this language model, and a vision tower of the least size."""
        text = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 32768,
        }
        if self.family == "llava_next":
            vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            text["model_type"] = "llama"
            config = AutoConfig.for_model("llava_next", text_config=text, vision_config=vision)
        else:
            vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
            vision |= {"out_hidden_size": self.hidden, "fullatt_block_indexes": [0]}
            rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
            part = self.head_width // 2
            rope["mrope_section"] = [part // 4, part * 3 // 8, part - part // 4 - part * 3 // 8]
            text["rope_parameters"] = rope
            config = AutoConfig.for_model(self.family, text_config=text, vision_config=vision)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = self.tied
        return config

    def build(self, dtype: torch.dtype, device: str, seed: int = 0) -> PreTrainedModel:
        """The model with weights from a seed; end tokens are left out, so that every answer has its full length."""
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(self.config(), dtype=dtype)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model.eval()

    @property
    def layer_weights(self) -> int:
        """Weights that one pass of the decoder reads, without head and embedding."""
        width = self.head_width
        attention = self.hidden * width * (2 * self.heads + 2 * self.groups)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary

    def cache_elements(self, tokens: int) -> int:
        """Keys and values of so many tokens over all layers."""
        return 2 * self.layers * self.groups * self.head_width * tokens


SHAPES = {
    "llava-1.6-7b": Shape(32, 4096, 11008, 32, 32, 32064, "llava_next", 2.98, 2880),
    "llava-1.6-13b": Shape(40, 5120, 13824, 40, 40, 32064, "llava_next", 2.89, 2880),
    "qwen2.5-vl-3b": Shape(36, 2048, 11008, 16, 2, 151936, "qwen2_5_vl", 2.19, 1024, tied=True),
    "qwen2.5-vl-7b": Shape(28, 3584, 18944, 28, 4, 152064, "qwen2_5_vl", 2.24, 1024),
}
# For a machine without a GPU: the same code in seconds.
TINY_SHAPES = {
    "tiny-llava": Shape(2, 64, 96, 4, 4, 160, "llava_next", 1.5, 20, head_width=16),
    "tiny-qwen": Shape(2, 64, 96, 4, 2, 160, "qwen2_5_vl", 1.5, 16, head_width=16),
}


def prompts(shape: Shape, context: int, batch: int, device: str, seed: int = 1) -> dict[str, Tensor]:
    """Random text of `context` tokens a row; what the tokens say does not matter for speed."""
    generator = torch.Generator().manual_seed(seed)
    # Placeholders for pictures lie at the end of the vocabulary or above it.
    tokens = torch.randint(3, shape.vocabulary * 9 // 10, (batch, context), generator=generator)
    return {"input_ids": tokens.to(device), "attention_mask": torch.ones_like(tokens).to(device)}
