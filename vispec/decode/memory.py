"""What one call leaves for the next with the same model and draft: what it learned, and its rounds."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Hashable
from typing import Any

from vispec.decode.kept import KeptRounds
from vispec.targets import load_target

# Rounds that are kept for each model and draft, the most recent ones: each holds caches of its own.
KEPT_ROUNDS = 2

_policies: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()
_rounds: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def recall(model: Any, draft: Any, circumstances: Hashable) -> Any | None:
    """A copy of the policy that was kept, so that calls at the same time do not meddle; None where nothing was."""
    found = _policies.get(draft, {}).get(model, {}).get(circumstances)
    return copy.deepcopy(found)


def keep(model: Any, draft: Any, circumstances: Hashable, policy: Any) -> None:
    """Keeps a policy as long as its model and its draft live."""
    models = _policies.setdefault(draft, weakref.WeakKeyDictionary())
    models.setdefault(model, {})[circumstances] = policy


def take_rounds(model: Any, draft: Any | None, circumstances: Hashable) -> KeptRounds:
    """The latest rounds that were put back, from now on the caller's alone; fresh ones where there are none."""
    with _lock:
        kept = _rounds.get(model, {}).get(model if draft is None else draft, [])
        for place in reversed(range(len(kept))):
            if kept[place][0] == circumstances:
                return kept.pop(place)[1]
    return KeptRounds()


def put_back_rounds(model: Any, draft: Any | None, circumstances: Hashable, rounds: KeptRounds) -> None:
    """Keeps rounds as long as their model and their draft live, or until newer ones take their place."""
    with _lock:
        drafts = _rounds.setdefault(model, weakref.WeakKeyDictionary())
        kept = drafts.setdefault(model if draft is None else draft, [])
        kept.append((circumstances, rounds))
        del kept[:-KEPT_ROUNDS]


def release(model: Any) -> None:
    """Gives back the memory that calls with this model have left on its device for the next ones.

    On a CUDA device a call leaves its key-value caches and its captured rounds, at most two sets for each draft; they
    go with the model or the draft, or here. The next call makes them anew.

    Args:
        model: as given to `fast_generate`.
    """
    with _lock:
        _rounds.pop(load_target(model).model, None)
