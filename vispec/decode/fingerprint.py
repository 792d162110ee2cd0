"""What a captured round depends on beside the buffers it works on, in a form that two calls can compare."""

from __future__ import annotations

import functools
import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from vispec.cache import KeyValueCache
from vispec.ops.backend import choice

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
PLAIN_TYPES = frozenset(PLAIN)
# What `nn.Module` itself keeps in every module; of it only these matter here, and hooks.
BOOKKEEPING = frozenset(vars(nn.Module()))


class Fingerprint:
    """A walk over everything reachable from some modules and objects, noted as a flat list.

    Noted are addresses, shapes, strides and dtypes of tensors, kinds of modules and their forward functions, plain
    attributes (numbers, strings, and containers of them: that is where adapters and configs keep what they are set
    to), the identity of everything else, and the settings of torch that decide which kernels run. Values of tensors
    are not: a graph reads them anew. Equal fingerprints mean that a graph over the one would do what the other's
    Python would.

    A module with a forward hook, or a forward pass of its own put in by hand, runs code that no walk sees through:
    its fingerprint equals no other, nor itself.

    Nothing that was walked over is kept alive.

    Args:
        roots: modules, tensors, plain values, or objects with attributes. Key-value caches are passed over.
    """

    def __init__(self, *roots: Any) -> None:
        self._marks: list[Any] = _settings()
        # Weak references: while one is held, its own address stands for what it refers to, alive or not.
        self._references: list[Any] = []
        self._seen: dict[int, int] = {}
        self._opaque = bool(global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)
        for root in roots:
            self._note(root)
        # Addresses mean something only while the walk goes on.
        self._seen.clear()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint) or self._opaque or other._opaque:
            return False
        return self._marks == other._marks

    __hash__ = None

    def _note(self, value: Any) -> None:
        kind = type(value)
        if kind in PLAIN_TYPES:
            # With its type, since 1 == True == 1.0.
            self._marks += (kind, value)
        elif isinstance(value, Tensor):
            self._note_tensor(value)
        elif isinstance(value, type):
            self._marks.append(value)
        elif isinstance(value, types.FunctionType | types.BuiltinFunctionType):
            self._note_identity(value)
        elif id(value) in self._seen:
            self._marks.append(self._seen[id(value)])
        else:
            self._seen[id(value)] = len(self._seen)
            self._note_composite(kind, value)

    def _note_composite(self, kind: type, value: Any) -> None:
        """What may hold other values, itself among them."""
        self._marks.append(kind)
        if isinstance(value, nn.Module):
            self._note_module(value)
        elif isinstance(value, dict):
            self._note_items(value)
        elif isinstance(value, list | tuple):
            self._marks.append(len(value))
            for item in value:
                self._note(item)
        elif isinstance(value, set | frozenset):
            plain = all(type(item) in PLAIN_TYPES for item in value)
            self._marks.append(frozenset(value) if plain else frozenset(map(self._identity, value)))
        elif isinstance(value, types.MethodType):
            self._note_identity(value.__func__)
            self._note(value.__self__)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._note(part)
        elif isinstance(value, KeyValueCache):
            pass
        elif hasattr(value, "__dict__"):
            self._note_items(vars(value))
        else:
            self._note_identity(value)

    def _note_items(self, items: dict[Any, Any]) -> None:
        self._marks.append(len(items))
        for name, value in items.items():
            self._note(name)
            self._note(value)

    def _note_module(self, module: nn.Module) -> None:
        own, marks = vars(module), self._marks
        if own.get("_forward_hooks") or own.get("_forward_pre_hooks") or "forward" in own or "_parameters" not in own:
            self._opaque = True
            return
        parameters, buffers, children = own["_parameters"], own["_buffers"], own["_modules"]
        marks += (type(module).forward, own["training"], len(parameters), len(buffers), len(children))
        for name, value in (*parameters.items(), *buffers.items(), *own.items(), *children.items()):
            if name in BOOKKEEPING:
                continue
            marks.append(name)
            # Most attributes are plain, and this loop is most of the walk.
            if type(value) in PLAIN_TYPES:
                marks += (type(value), value)
            else:
                self._note(value)

    def _note_tensor(self, tensor: Tensor) -> None:
        kind = type(tensor)
        if kind is not Tensor and kind is not nn.Parameter:
            # Quantised weights are such kinds: their parts lie in attributes.
            self._marks.append(kind)
            self._note_items(vars(tensor))
            if hasattr(tensor, "__tensor_flatten__"):
                for name in tensor.__tensor_flatten__()[0]:
                    self._note(getattr(tensor, name))
                return
        if tensor.layout is not torch.strided:
            self._opaque = True
            return
        self._marks += (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def _note_identity(self, value: Any) -> None:
        self._marks.append(self._identity(value))

    def _identity(self, value: Any) -> int:
        try:
            held = weakref.ref(value)
        except TypeError:
            held = value
        self._references.append(held)
        return id(held)


def _settings() -> list[Any]:
    """What decides about kernels outside any module."""
    cuda = torch.backends.cuda
    return [
        choice(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        *(kernel() for kernel in (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled)),
        cuda.cudnn_sdp_enabled(),
    ]
