"""Models, processors, drafts and devices as the command line names them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vispec import _native
from vispec.drafts import load_draft
from vispec.targets import join_projections

DEMO = "demo"
DTYPES = ("auto", "bfloat16", "float16", "float32")


class CommandError(Exception):
    """Something the caller can mend, told in one line."""


class Loaded(NamedTuple):
    """A model, its draft (None: plain decoding), and its processor or tokenizer."""

    model: Any
    draft: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)


@contextmanager
def progress(message: str, quiet: bool = False) -> Iterator[None]:
    """Shows on stderr that something long is under way; one plain line where no one watches."""
    console = Console(stderr=True)
    if quiet:
        yield
    elif console.is_terminal:
        with console.status(message):
            yield
    else:
        print(message, file=sys.stderr)
        yield


def find_device(name: str) -> torch.device:
    """A device by name, or `auto`: a GPU where there is one and this build has kernels for it.

    Raises: CommandError for an unknown device and for one that is not here.
    """
    if name == "auto":
        gpu = torch.cuda.is_available()
        if gpu and not _native.build_info().get("cuda"):
            print(
                "a GPU is here, but this build has no CUDA kernels: running on the CPU; "
                f"build them with: {_native.BUILD_CUDA}",
                file=sys.stderr,
            )
            gpu = False
        return torch.device("cuda" if gpu else "cpu")
    wanted = "--device must be auto, cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"{wanted}, got {name}") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"{wanted}, got {name}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CommandError(f"--device must be usable here, got {name}: {reason}") from error
    return device


def load(model: str, draft: str | None, *, dtype: str = "auto", device: str = "auto", quiet: bool = False) -> Loaded:
    """Loads what `--model` and `--draft` name; no draft gives plain decoding on our engine.

    `demo:FOLDER` is SmolLaVA with the projector and the language model's update of FOLDER/smollava.safetensors.

    Raises: CommandError and what the loaders raise for files that are missing or broken.
    """
    transformers.utils.logging.set_verbosity_error()
    place = find_device(device)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    if model == DEMO:
        return load_demo(wanted, place, draft, quiet)
    if model.startswith(f"{DEMO}:"):
        return _load_other_demo(Path(model.removeprefix(f"{DEMO}:")), wanted, place, draft, quiet)
    local = Path(model).is_dir()
    if not local and (Path(model).is_absolute() or model.count("/") > 1):
        raise CommandError(f"--model must be a folder or a hub id of the form owner/name, got {model}")
    if local or quiet:
        # Bars are kept for downloads, which take minutes.
        transformers.utils.logging.disable_progress_bar()
    with progress(f"loading {model}", quiet or not local):
        try:
            config = AutoConfig.from_pretrained(model)
            pictures = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            reader = AutoProcessor if pictures else AutoTokenizer
            processor = reader.from_pretrained(model)
            kind = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
            found = kind.from_pretrained(model, dtype=wanted or "auto").to(place).eval()
            join_projections(found)
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise CommandError(f"--model {model}: {_first_paragraph(error)}") from error
    return Loaded(found, _draft(draft, found), processor)


def load_demo(dtype: torch.dtype | None, device: torch.device, draft: str | None, quiet: bool = False) -> Loaded:
    """Loads SmolLaVA, with its own draft unless another is named ("": none)."""
    from vispec import demo

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with progress("loading SmolLaVA (135 million parameters)", quiet):
        found, own, processor = demo.load(dtype=dtype, device=device)
        join_projections(found)
    if draft is None:
        if own is None:
            print("demo: no draft is shipped; decoding plainly", file=sys.stderr)
        return Loaded(found, own, processor)
    return Loaded(found, _draft(draft, found), processor)


def _load_other_demo(
    weights: Path, dtype: torch.dtype | None, device: torch.device, draft: str | None, quiet: bool
) -> Loaded:
    """SmolLaVA with other weights, for which no draft is shipped."""
    from vispec.demo import load_target

    if not (weights / "smollava.safetensors").is_file():
        raise CommandError(f"--model {DEMO}:FOLDER must name a folder that holds smollava.safetensors, got {weights}")
    transformers.utils.logging.disable_progress_bar()
    with progress(f"loading SmolLaVA with {weights}", quiet):
        found, processor = load_target(dtype, device, weights=weights)
        join_projections(found)
    return Loaded(found, _draft(draft, found), processor)


def _draft(name: str | None, model: Any) -> Any:
    if not name:
        return None
    try:
        return load_draft(name, target=model)
    except OSError as error:
        raise CommandError(f"--draft {name}: {_first_paragraph(error)}") from error


def _first_paragraph(error: Exception) -> str:
    """The hub's errors run over many lines; the first ones say what is missing."""
    return " ".join(str(error).strip().split("\n\n")[0].split())
