"""What one call learned of costs and acceptance, kept for the next call with the same model and draft."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable
from typing import Any

from vispec.decode.policy import AdaptiveTree

_kept: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()


def recall(model: Any, draft: Any, circumstances: Hashable) -> AdaptiveTree | None:
    """A copy of what was kept, so that calls that run at the same time do not meddle; None where nothing was."""
    found = _kept.get(draft, {}).get(model, {}).get(circumstances)
    return copy.deepcopy(found)


def keep(model: Any, draft: Any, circumstances: Hashable, policy: AdaptiveTree) -> None:
    """Keeps a policy as long as its model and its draft live."""
    models = _kept.setdefault(draft, weakref.WeakKeyDictionary())
    models.setdefault(model, {})[circumstances] = policy
