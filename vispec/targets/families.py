"""Which adapter serves which model."""

from __future__ import annotations

from transformers import PreTrainedModel

from vispec.targets.base import Target
from vispec.targets.m_rope import MRopeTarget


def load_target(model: PreTrainedModel | Target) -> Target:
    """Wraps a Hugging Face model as a target; a target is returned as it is.

    Models that count their own three-row positions (`get_rope_index`) need `MRopeTarget`; every other decoder-only
    model is served by the generic adapter. A family that differs gets a file of its own and a line here.

    Raises: ValueError for models that are not supported, by name.
    """
    if isinstance(model, Target):
        return model
    if hasattr(getattr(model, "model", None), "get_rope_index"):
        return MRopeTarget(model)
    return Target(model)
