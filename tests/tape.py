"""A stand-in for CUDA graphs on the CPU: the operations of a function are noted once and repeated on the same tensors.

As with a graph, a replay runs no Python of the function: it reads and writes the tensors of the capture, wherever the
function's own objects point by then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

GARBAGE = {torch.bool: True, torch.uint8: 255, torch.int32: -(2**20)}


def poison(tensor: Tensor) -> None:
    """Fills a tensor with what no answer survives: NaN, or a number far out of range."""
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)
    else:
        tensor.fill_(GARBAGE.get(tensor.dtype, -(2**40)))


class Tape(TorchDispatchMode):
    """Has `torch.cuda.CUDAGraph`'s `replay` and `pool`."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Callable, tuple, dict, list[Any], list[Tensor]]] = []
        # What the function wrote to while it was noted, as it was before.
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.replays = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in _written(function, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = storage, storage.clone()
        result = function(*args, **kwargs)
        given = {_memory(value) for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)}
        outputs = tree_flatten(result)[0]
        made = [value for value in outputs if isinstance(value, Tensor) and _memory(value) not in given]
        self._steps.append((function, args, kwargs, outputs, made))
        return result

    def undo(self) -> None:
        """Leaves the function's tensors as they were before it was noted: a capture computes nothing."""
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        self.replays += 1
        for _, _, _, _, made in self._steps:
            for tensor in made:
                poison(tensor)
        for function, args, kwargs, outputs, made in self._steps:
            again = tree_flatten(function(*args, **kwargs))[0]
            fresh = {id(tensor) for tensor in made}
            for old, new in zip(outputs, again, strict=True):
                if id(old) in fresh:
                    old.copy_(new)

    def pool(self) -> str:
        return "pool"


def _written(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that an operation changes in place."""
    found = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return [tensor for tensor in tree_flatten(found)[0] if isinstance(tensor, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Captures:
    """Takes the place of `vispec.decode.replay.capture` and counts."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return len(self.tapes)

    @property
    def replays(self) -> int:
        return sum(tape.replays for tape in self.tapes)

    def __call__(self, function: Callable[[], Tensor], pool: Any) -> tuple[Tape, Tensor]:
        tape = Tape()
        with self._lock, tape:
            result = function()
        tape.undo()
        self.tapes.append(tape)
        return tape, result
