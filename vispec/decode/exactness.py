"""What an answer is equal to: the levels of `fast_generate`'s `exact`."""

from __future__ import annotations

from typing import Any

from vispec.targets import Target, load_target, row_exact

LAW, GUARD, SELF = "law", "guard", "self"
EXACTNESS = (LAW, GUARD, SELF)


def load_target_for(model: Any, exact: str) -> Target:
    """The model as a target with the passes that this level needs.

    Raises: ValueError for another level, or for a model that the level does not serve.
    """
    if exact not in EXACTNESS:
        raise ValueError(f"fast_generate: exact must be one of {', '.join(EXACTNESS)}, got {exact!r}")
    target = load_target(model)
    return row_exact(target) if exact == SELF else target


def check_exactness(exact: str, sampled: bool) -> None:
    """Refuses a level that the way of choosing tokens has no use for."""
    if exact == GUARD and sampled:
        raise ValueError(
            'fast_generate: exact must be "law" or "self" where do_sample is True, got "guard": '
            "near-ties only decide greedy answers"
        )
