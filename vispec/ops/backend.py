"""Which code runs an op: the PyTorch reference, native CPU code, CUDA, or emulated CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from vispec import _native

BACKENDS = ("reference", "native", "emulated")

_forced: str | None = None


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every op inside the block; for tests and comparisons.

    Args:
        name: "reference", "native", "emulated", or None for the normal choice.

    Raises:
        ValueError: when the name is unknown.

    Notes:
        Process-wide, not per thread.
    """
    global _forced
    before, _forced = _forced, _checked(name, "use_backend: name")
    try:
        yield
    finally:
        _forced = before


def _checked(name: str | None, what: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{what} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def choice() -> str | None:
    """The backend that was asked for by name, None for the normal choice."""
    return _forced or _checked(os.environ.get("VISPEC_BACKEND") or None, "VISPEC_BACKEND")


def native_for(op: str, tensor: torch.Tensor) -> ModuleType | None:
    """The compiled module that serves `tensor`'s device, or None where the PyTorch reference does.

    Raises:
        RuntimeError: when a CUDA tensor meets a build without CUDA kernels, or when a backend that
            was asked for by name is not built. Never a silent slow path on a GPU.
    """
    name = choice()
    if name == "reference":
        return None
    device = tensor.device.type
    if name == "emulated":
        return _native.emulated(op)
    if device == "cpu":
        if name is None and _native.extension is None:
            return None
        module = _native.require(op)
        module.set_num_threads(torch.get_num_threads())
        return module
    if device == "cuda":
        return _native.require_cuda(op)
    raise RuntimeError(
        f"{op}: native code serves cpu and cuda tensors, got {tensor.device}; "
        "set VISPEC_BACKEND=reference to run it in PyTorch"
    )


def kernels_for(op: str, tensor: torch.Tensor) -> ModuleType | None:
    """As `native_for`, for ops that the CPU leaves to PyTorch: a module only where CUDA kernels serve the tensor."""
    if tensor.device.type == "cpu" and choice() != "emulated":
        return None
    return native_for(op, tensor)


def stream_of(tensor: torch.Tensor) -> int:
    """The current CUDA stream of the tensor's device as an integer, 0 for the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
