"""The table of VLM families that differ from the generic adapter: one line each."""

from __future__ import annotations

from transformers import PreTrainedModel

from vispec.targets.base import Target
from vispec.targets.qwen2_5_vl import Qwen25VLTarget

FAMILIES: dict[str, type[Target]] = {
    "qwen2_5_vl": Qwen25VLTarget,
    "qwen2_vl": Qwen25VLTarget,
}


def load_target(model: PreTrainedModel | Target) -> Target:
    """Wraps a Hugging Face model as a target; a target is returned as it is.

    Raises: ValueError for models that are not supported, by name.
    """
    if isinstance(model, Target):
        return model
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return FAMILIES.get(kind, Target)(model)
