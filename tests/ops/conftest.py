"""Every op test runs on every backend that exists here, against the reference on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from vispec import _native
from vispec.ops import use_backend

# Set by `make test`: a backend named here must be there, so that a broken build cannot pass as a
# skip.
REQUIRED = [name for name in os.environ.get("VISPEC_TEST_REQUIRE", "").split(",") if name]


def why_missing(name: str) -> str | None:
    """Why a backend cannot run here, or None."""
    if name == "native" and _native.extension is None:
        return "the native extension is not built"
    if name == "emulated":
        try:
            _native.emulated("tests")
        except RuntimeError as error:
            return str(error)
    if name == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        if not _native.build_info().get("cuda"):
            return "the native extension was built without CUDA kernels"
    return None


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What an op allocates for itself starts as bytes of 255: NaN in every floating-point format."""
    empty = torch.empty
    with mock.patch.object(torch, "empty", lambda *size, **more: empty(*size, **more).fill_(255)):
        yield


class Backend:
    """One way to run the ops: a name, a device, and a switch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = "cuda" if name == "cuda" else "cpu"

    def run(self, op, *tensors, **named) -> dict:
        """Call `op` on this backend's device with copies of the tensors; return the named ones
        afterwards.

        Strides are kept, so that a view with gaps stays one. Workspaces are poisoned.
        """
        moved = [self._move(tensor) for tensor in tensors]
        keywords = {name: self._move(value) for name, value in named.items()}
        with use_backend(None if self.name == "cuda" else self.name), poisoned_memory():
            op(*moved, **keywords)
        if self.name == "cuda":
            torch.cuda.synchronize()
        back = {name: value.cpu() for name, value in keywords.items() if isinstance(value, torch.Tensor)}
        back["positional"] = [self._back(value) for value in moved]
        return back

    def _move(self, value):
        if isinstance(value, torch.Tensor):
            storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).clone().to(self.device)
            return storage.as_strided(value.shape, value.stride(), value.storage_offset())
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._move(item) for item in value))
        if isinstance(value, list):
            return [self._move(item) for item in value]
        return value

    def _back(self, value):
        if isinstance(value, list):
            return [item.cpu() for item in value]
        return value.cpu() if isinstance(value, torch.Tensor) else value


def available(name: str) -> Backend:
    """A backend by name; skips the test where it cannot run here, fails it where it was required."""
    reason = why_missing(name)
    if reason is not None:
        if name in REQUIRED:
            pytest.fail(f"VISPEC_TEST_REQUIRE names {name}, but {reason}")
        pytest.skip(reason)
    return Backend(name)


@pytest.fixture(params=["reference", "native", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request) -> Backend:
    return available(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240917)
