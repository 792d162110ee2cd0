"""Tiny models as a user has them on disk: with tokenizer, processor, draft and pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tests import tiny
from vispec import ViSpecDraft

PROMPT = "w4 w5 w6"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %} w9"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: `w7` is token 7."""
    words = ["<pad>", "<s>", "</s>"] + [f"w{token}" for token in range(3, tiny.IMAGE_TOKEN)]
    words.append("<image>")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def make_processor(chat: bool) -> LlavaProcessor:
    side = {"height": 2 * tiny.PATCH, "width": 2 * tiny.PATCH}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=make_tokenizer(),
        patch_size=tiny.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def save_all(root: Path) -> None:
    """Writes models with their processors, their drafts, and pictures into a folder."""
    for name in ("llava", "llama"):
        model = tiny.build(name).model
        model.save_pretrained(root / name)
        ViSpecDraft.for_target(model).save_pretrained(root / f"{name}_draft")
    make_processor(chat=True).save_pretrained(root / "llava")
    make_tokenizer().save_pretrained(root / "llama")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(root / "red.png")
    Image.new("L", (30, 40), 90).save(root / "grey.png")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")


def expected(name: str, folder: Path, pictures: list[str], length: int = 8) -> list[int]:
    """Plain generation's tokens, put together without the command line."""
    model = tiny.build(name).model
    if name == "llama":
        inputs = {"input_ids": torch.tensor([[4, 5, 6]])}
    else:
        text = "<s>" + "<image> " * len(pictures) + PROMPT + " w9"
        images = [Image.open(folder / picture).convert("RGB") for picture in pictures]
        processor = make_processor(chat=False)
        inputs = processor(text=[text], images=images or None, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=length)
    return out[0, inputs["input_ids"].shape[1] :].tolist()
