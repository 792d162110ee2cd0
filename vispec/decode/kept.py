"""What rounds that run ahead of the host leave for the next call: their buffers, and the graphs over them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from vispec.cache import KeyValueCache
from vispec.decode.fingerprint import Fingerprint
from vispec.decode.replay import Replayed


class Buffers:
    """Tensors and caches by name that stay where they are while their content is replaced: see `drafts.base.Places`.

    Attributes:
        moves: how often one was given up for another, because the new content did not fit.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.caches: dict[str, KeyValueCache] = {}
        self.moves = 0

    def tensor(self, name: str, value: Tensor) -> Tensor:
        """See `Places.tensor`."""
        held = self.tensors.get(name)
        if held is not None and (held.shape, held.dtype, held.device) == (value.shape, value.dtype, value.device):
            return held.copy_(value)
        self.moves += 1
        self.tensors[name] = value
        return value

    def cache(self, name: str, value: KeyValueCache) -> KeyValueCache:
        """See `Places.cache`."""
        held = self.caches.get(name)
        if held is not None and held.load(value):
            return held
        self.moves += 1
        self.caches[name] = value
        return value


class KeptRounds:
    """One call's rounds at a time: a call takes them out of `memory`, works with them, and puts them back.

    They hold no model, no draft and nothing of a call, so that they keep none of these alive. What a call leaves in the
    buffers is never read: the next one fills them from its own prefill.

    Attributes:
        buffers: all that a round reads and writes beside the weights.
        tokens: committed tokens a row that the caches have room for; 0: none yet.
    """

    def __init__(self) -> None:
        self.buffers = Buffers()
        self.tokens = 0
        self._graphs: dict[Hashable, Replayed] = {}

    def leave(self) -> None:
        """Forgets graphs that were not captured: warm-ups belong to a call."""
        self._graphs = {name: replayed for name, replayed in self._graphs.items() if replayed.settled}

    def keep_equal(self, fingerprint: Fingerprint) -> None:
        """Forgets the graphs of a model that was not what it is now."""
        self._graphs = {
            name: replayed for name, replayed in self._graphs.items() if replayed.fingerprint == fingerprint
        }

    def reset(self) -> None:
        """Forgets all graphs, because buffers have moved."""
        self._graphs = {}

    def replayed(self, name: Hashable, model: str, device: torch.device) -> Replayed:
        """What runs the work of that name, made where there is none; `model` is named in warnings."""
        if name not in self._graphs:
            self._graphs[name] = Replayed(model, device)
        return self._graphs[name]

    @property
    def pool(self) -> Any:
        """Memory for one more graph: that of the others, since they run one after another; None: its own."""
        return next((replayed.graph.pool() for replayed in self._graphs.values() if replayed.graph is not None), None)
