"""Pictures and prompts: from the command line to what the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vispec.cli.loading import CommandError


def open_pictures(names: Sequence[str | Path]) -> list[Image.Image]:
    """Reads pictures as RGB.

    Raises: CommandError for a file that is missing or no picture.
    """
    pictures = []
    for name in names:
        if not Path(name).is_file():
            raise CommandError(f"--image must be a file, got {name}: not found")
        try:
            with Image.open(name) as picture:
                pictures.append(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise CommandError(f"--image must be a picture, got {name}: {error}") from error
    return pictures


def make_inputs(processor: Any, prompt: str, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """What the model takes: the prompt in the chat template where there is one, and the pictures.

    Without a chat template the prompt goes in as it is, with a placeholder for each picture before
    it unless it holds placeholders itself.

    Raises: CommandError for an empty prompt, and for pictures that the model or prompt cannot take.
    """
    if not prompt.strip():
        raise CommandError("--prompt must not be empty")
    sees = hasattr(processor, "image_processor")
    if pictures and not sees:
        raise CommandError(f"--image needs a vision-language model, got {len(pictures)} for a text-only one")
    if getattr(processor, "chat_template", None):
        parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": prompt}]
        turn = {"role": "user", "content": parts if sees else prompt}
        text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    else:
        text = _with_placeholders(processor, prompt, len(pictures)) if sees else prompt
    more: dict[str, Any] = {}
    start = getattr(processor, "tokenizer", processor).bos_token
    if start and text.startswith(start):
        # The template has written the first token, and the tokenizer would write it again.
        more["add_special_tokens"] = False
    if pictures:
        more["images"] = list(pictures)
    return dict(processor(text=[text], return_tensors="pt", **more))


def _with_placeholders(processor: Any, prompt: str, pictures: int) -> str:
    token = getattr(processor, "image_token", "<image>")
    named = prompt.count(token)
    if not named:
        return (token + "\n") * pictures + prompt
    if named != pictures:
        raise CommandError(f"--prompt must hold {token} once for each picture, got {named} for {pictures}")
    return prompt
