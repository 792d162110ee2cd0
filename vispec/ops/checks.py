"""Argument checks shared by the ops: one line each, with the real values, before any work."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def describe(value: object) -> str:
    """What an argument is, for an error message: "float32 [2, 5]" for a tensor."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    letters: str,
    shape: tuple[int, ...],
    like: Tensor,
) -> None:
    """Require dtype, shape, contiguity and the device of `like`; -1 in `shape`: any size."""
    check_kind(op, name, tensor, dtype, letters, shape, like)
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")


def check_kind(
    op: str,
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    letters: str,
    shape: tuple[int, ...],
    like: Tensor,
) -> None:
    """`check_tensor` for a tensor with any strides."""
    if (
        not isinstance(tensor, Tensor)
        or tensor.dtype is not dtype
        or (tensor.shape != shape and not _fits(tensor.shape, shape))
    ):
        sizes = ", ".join(str(size) for size in shape if size >= 0)
        known = f" = [{sizes}]" if -1 not in shape else ""
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{op}: {name} must be {kind} [{letters}]{known}, got {describe(tensor)}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like the rest, got {tensor.device}")


def _fits(sizes: torch.Size, shape: tuple[int, ...]) -> bool:
    return len(sizes) == len(shape) and all(got == want for got, want in zip(sizes, shape, strict=True) if want >= 0)


def check_tensors(
    op: str,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    letters: str,
    shape: tuple[int, ...],
    like: Tensor,
) -> None:
    """`check_tensor` for several tensors of one kind."""
    for name, tensor in tensors.items():
        check_tensor(op, name, tensor, dtype, letters, shape, like)


def check_logits(op: str, logits: Tensor, letters: str) -> tuple[int, int, int]:
    """Require three dimensions of floating-point numbers, the last one dense; return the sizes."""
    if not isinstance(logits, Tensor) or logits.dtype not in LOGITS_DTYPES or logits.dim() != 3:
        raise ValueError(f"{op}: logits must be float32, float16 or bfloat16 [{letters}], got {describe(logits)}")
    B, rows, V = logits.shape
    if V == 0 or rows == 0 or B == 0:
        raise ValueError(f"{op}: logits must not be empty, got {describe(logits)}")
    if V > 1 and logits.stride(2) != 1:
        raise ValueError(f"{op}: the last dimension of logits must be contiguous, got strides {logits.stride()}")
    return B, rows, V


def check_rows(op: str, name: str, tensor: Tensor, letters: str, like: Tensor) -> tuple[int, int]:
    """Require two dimensions of floating-point numbers, the last one dense, with the dtype, shape and device of
    `like`; return the sizes."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in LOGITS_DTYPES or tensor.dim() != 2:
        raise ValueError(f"{op}: {name} must be float32, float16 or bfloat16 [{letters}], got {describe(tensor)}")
    if tensor.dtype is not like.dtype or tensor.shape != like.shape:
        raise ValueError(f"{op}: {name} must be [{letters}] = {describe(like)}, got {describe(tensor)}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like the rest, got {tensor.device}")
    rows, columns = tensor.shape
    if columns > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{op}: the last dimension of {name} must be contiguous, got strides {tensor.stride()}")
    return rows, columns


def check_range(op: str, name: str, value: int, low: int, high: int) -> None:
    """Require low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be from {low} to {high}, got {value}")
