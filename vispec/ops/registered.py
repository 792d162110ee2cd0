"""The ops as torch.compile sees them: one opaque operator each, so that a compiled region goes through them unbroken.

Eager calls never come here: torch.compile is told what to trace in place of a public function, and the function itself
stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vispec.ops.accept import Sampling, accept
from vispec.ops.build_tree import build_tree
from vispec.ops.commit import commit
from vispec.ops.grow_level import grow_level

_library = torch.library.Library("vispec", "DEF")


def register(op: Callable[..., None], writes: tuple[str, ...]) -> None:
    """Make the operator `torch.ops.vispec.<op>`, and let torch.compile trace it in place of `op`.

    Args:
        op: a public op; its annotations become the schema.
        writes: the parameters that it writes.
    """
    operator = _operator(op, writes)

    def traced(*tensors, **named):
        operator(*tensors, **named)

    torch.compiler.substitute_in_graph(op, skip_signature_check=True)(traced)


def _operator(function: Callable[..., None], writes: tuple[str, ...]) -> Callable[..., None]:
    name = function.__name__
    _library.define(name + torch.library.infer_schema(function, mutates_args=writes))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vispec::{name}", lambda *_, **__: None, lib=_library)
    return getattr(torch.ops.vispec, name)


def _register_accept(writes: tuple[str, ...]) -> None:
    """As `register`; a schema knows no named tuple, so the sampling settings cross as a list, empty for None."""

    def flat(*tensors: Tensor, sampling: Sequence[Tensor], **named: Tensor) -> None:
        accept(*tensors, sampling=Sampling(*sampling) if sampling else None, **named)

    signature = inspect.signature(accept)
    settings = signature.parameters["sampling"].replace(annotation=Sequence[Tensor], default=inspect.Parameter.empty)
    parameters = {**signature.parameters, "sampling": settings}
    flat.__name__ = accept.__name__
    flat.__signature__ = signature.replace(parameters=list(parameters.values()))
    operator = _operator(flat, writes)

    def traced(*tensors, sampling=None, **named):
        operator(*tensors, sampling=[] if sampling is None else list(sampling), **named)

    torch.compiler.substitute_in_graph(accept, skip_signature_check=True)(traced)


register(
    grow_level,
    writes=(
        "candidate_tokens",
        "candidate_scores",
        "candidate_parents",
        "next_frontier",
        "next_rows",
        "next_tokens",
        "next_scores",
    ),
)
register(build_tree, writes=("tokens", "parents", "depths", "ancestors", "scores"))
_register_accept(writes=("finished", "path", "emitted", "counts", "status"))
register(commit, writes=("tensors",))
