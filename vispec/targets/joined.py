"""Weights of products that read the same rows, laid one behind another: one product then serves them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Weights go on beginning at a cache line, as wide accesses of all matrix kernels want it.
ALIGNMENT_BYTES = 64


def join(linears: Sequence[nn.Module]) -> bool:
    """Makes the parameters of linear layers views of one matrix, where they are not; says whether they now are.

    They stay the same objects with the same values. Left as they are: layers that are more than an `nn.Linear`, that
    differ in dtype, device or the presence of a bias, weights made in inference mode, and such that a weight would
    begin inside a cache line.
    """
    if not _may_join(linears):
        return False
    if joined(linears) is None:
        with torch.inference_mode(False), torch.no_grad():
            _lay_together([linear.weight for linear in linears])
            if linears[0].bias is not None:
                _lay_together([linear.bias for linear in linears])
    return True


def joined(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """The one weight [N, C] and bias [N] of plain linear layers that lie one behind another, or None."""
    if not all(map(_is_plain, linears)):
        return None
    weight = _as_one([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears]
    if weight is None or all(bias is None for bias in biases):
        return None if weight is None else (weight, None)
    bias = None if None in biases else _as_one(biases)
    return None if bias is None else (weight, bias)


def _is_plain(linear: object) -> bool:
    """Whether a product with the weight is all that calling this module does."""
    if type(linear) is not nn.Linear or "forward" in vars(linear) or type(linear.weight) is not nn.Parameter:
        return False
    return not (linear._forward_hooks or linear._forward_pre_hooks)


def _may_join(linears: Sequence[object]) -> bool:
    if not all(map(_is_plain, linears)):
        return False
    first = linears[0]
    if any((linear.bias is None) != (first.bias is None) for linear in linears):
        return False
    for tensors in ([linear.weight for linear in linears], [linear.bias for linear in linears]):
        if tensors[0] is None:
            continue
        kinds = {(t.dtype, t.device, t.shape[1:]) for t in tensors}
        if len(kinds) > 1 or any(t.is_inference() or not t.is_contiguous() or t.is_meta for t in tensors):
            return False
        if any(t.nbytes % ALIGNMENT_BYTES for t in tensors[:-1]):
            return False
    return True


def _lay_together(tensors: Sequence[Tensor]) -> None:
    together = torch.cat([tensor.data for tensor in tensors])
    for tensor, part in zip(tensors, together.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part


def _as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """One tensor over several that lie one behind another in one storage, or None."""
    first, after = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        alike = (tensor.dtype, tensor.shape[1:]) == (first.dtype, first.shape[1:]) and tensor.is_contiguous()
        if not alike or tensor.data_ptr() != after or _memory(tensor) != _memory(first):
            return None
        after += tensor.nbytes
    rows = sum(len(tensor) for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
