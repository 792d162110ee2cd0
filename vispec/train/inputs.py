"""From a conversation to what a model takes, one sample at a time, and samples padded into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vispec.train.data import Sample
from vispec.train.sources import PLACEHOLDER, ImageStore, UnusableSample


def extended(messages: Sequence[dict[str, Any]], extension: str) -> list[dict[str, Any]]:
    """The conversation with a request for a long answer behind its last user turn; "" changes nothing."""
    if not extension:
        return list(messages)
    last = messages[-1]
    parts = [dict(part) for part in last["content"]]
    if parts and parts[-1]["type"] == "text":
        parts[-1]["text"] = f"{parts[-1]['text']} {extension}"
    else:
        parts.append({"type": "text", "text": extension})
    return [*messages[:-1], {**last, "content": parts}]


def prompt_text(processor: Any, messages: Sequence[dict[str, Any]]) -> str:
    """The conversation in the processor's chat template; without a template, its one turn as it is.

    Raises: UnusableSample for pictures that the model cannot take, and for several turns without a template.
    """
    sees = hasattr(processor, "image_processor")
    pictures = any(part["type"] == "image" for message in messages for part in message["content"])
    if pictures and not sees:
        raise UnusableSample("text-only model", "the model takes no pictures")
    if getattr(processor, "chat_template", None):
        if not sees:
            messages = [{**message, "content": _plain(message, "")} for message in messages]
        return processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    if len(messages) != 1:
        raise UnusableSample("no chat template", f"a conversation of {len(messages)} turns needs one")
    return _plain(messages[0], getattr(processor, "image_token", PLACEHOLDER) + "\n")


def _plain(message: dict[str, Any], placeholder: str) -> str:
    return "".join(placeholder if part["type"] == "image" else part["text"] for part in message["content"])


def process(processor: Any, text: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    """The processor's tensors for one prompt, batch 1.

    Raises: UnusableSample where the processor refuses.
    """
    more: dict[str, Any] = {}
    start = getattr(processor, "tokenizer", processor).bos_token
    if start and text.startswith(start):
        # The template has written the first token, and the tokenizer would write it again.
        more["add_special_tokens"] = False
    if pictures:
        more["images"] = list(pictures)
    try:
        found = dict(processor(text=[text], return_tensors="pt", **more))
    except (ValueError, IndexError, TypeError) as error:
        raise UnusableSample("processor", " ".join(str(error).split())) from error
    found.setdefault("attention_mask", torch.ones_like(found["input_ids"]))
    # Llama's tokenizers offer token types that its models do not take.
    found.pop("token_type_ids", None)
    return found


def check_placeholders(tokens: Tensor, placeholders: Sequence[int], pictures: int) -> None:
    """Raises UnusableSample where a prompt with pictures holds no placeholder token, so the model cannot see them."""
    if pictures and not bool(torch.isin(tokens.cpu(), torch.tensor(list(placeholders))).any()):
        raise UnusableSample("no placeholder", f"{pictures} pictures, but no placeholder token in the prompt")


def sample_inputs(processor: Any, store: ImageStore, sample: Sample, longest: int | None = None) -> dict[str, Tensor]:
    """A stored sample as the model takes it, its answer behind its prompt, batch 1.

    `longest` cuts the answer so that the whole has at most so many tokens.
    Raises: UnusableSample for a picture that is gone; ValueError where prompt and pictures no longer give the
    stored tokens (another processor, another picture).
    """
    inputs = process(processor, sample.text, [store.open(image) for image in sample.images])
    if tuple(inputs["input_ids"][0].tolist()) != sample.prompt:
        raise ValueError(
            f"sample {sample.name}: prompt and pictures must give the {len(sample.prompt)} stored tokens, "
            f"got {inputs['input_ids'].shape[1]} (or others): the processor or a picture has changed"
        )
    answer = sample.answer if longest is None else sample.answer[: longest - len(sample.prompt)]
    shape = inputs["input_ids"].shape
    tokens = torch.cat([inputs["input_ids"], torch.tensor([list(answer)], dtype=torch.int64)], dim=1)
    # Whatever else runs along the sequence (token types of pictures) is zero for text.
    along = {name: F.pad(value, (0, len(answer))) for name, value in inputs.items() if value.shape == shape}
    return {**inputs, **along, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def merge_inputs(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples of batch 1 as one batch, padded on the right with zeros and masked.

    What runs along the sequence is padded; the rest (pictures, their sizes and grids) is joined along its first
    dimension, with trailing dimensions padded (LLaVA-NeXT's tiles a picture).
    """
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    names = dict.fromkeys(name for sample in samples for name in sample)
    merged = {}
    for name in names:
        pieces = []
        for sample in samples:
            length = sample["input_ids"].shape[1]
            value = sample.get(name)
            if value is not None and value.shape == (1, length):
                pieces.append(F.pad(value, (0, longest - length)))
            elif value is not None:
                pieces.append(value)
            elif _runs_along(name, samples):
                pieces.append(torch.zeros(1, longest, dtype=torch.int64))
        merged[name] = torch.cat(_padded_alike(pieces))
    return merged


def _runs_along(name: str, samples: Sequence[dict[str, Tensor]]) -> bool:
    """Whether a tensor runs along the sequence in the samples that have it: the others are text, and get zeros."""
    return all(sample[name].shape == sample["input_ids"].shape for sample in samples if name in sample)


def _padded_alike(pieces: list[Tensor]) -> list[Tensor]:
    largest = [max(sizes) for sizes in zip(*(piece.shape[1:] for piece in pieces), strict=True)]
    padded = []
    for piece in pieces:
        missing = [size - own for size, own in zip(largest, piece.shape[1:], strict=True)]
        padded.append(F.pad(piece, [side for count in reversed(missing) for side in (0, count)]))
    return padded
