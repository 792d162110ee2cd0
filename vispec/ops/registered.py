"""The ops as torch.compile sees them: one opaque operator each, so that a compiled region goes through them unbroken.

Eager calls never come here: torch.compile is told what to trace in place of a public function, and the function itself
stays as it is.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vispec.ops.accept import accept
from vispec.ops.adaptor import adaptor
from vispec.ops.build_tree import build_tree
from vispec.ops.commit import commit
from vispec.ops.grow_level import grow_level
from vispec.ops.int8_linear import int8_linear
from vispec.ops.path_attention import path_attention
from vispec.ops.rms_norm import rms_norm
from vispec.ops.rope_append import rope_append
from vispec.ops.silu_mul import silu_mul
from vispec.ops.tree_attention import tree_attention

_library = torch.library.Library("vispec", "DEF")
# The only spelling of a list that `infer_schema` of every torch we support knows.
_List = typing.Sequence  # noqa: UP006


def register(op: Callable[..., None], writes: tuple[str, ...]) -> None:
    """Make the operator `torch.ops.vispec.<op>`, and let torch.compile trace it in place of `op`.

    Args:
        op: a public op. Its annotations become the schema; a named tuple crosses as a list, empty for None.
        writes: every parameter that it may write.
    """
    name, signature, hints = op.__name__, inspect.signature(op), typing.get_type_hints(op)
    names = list(signature.parameters)
    tuples = {
        parameter: kind
        for parameter in names
        for kind in (hints[parameter], *typing.get_args(hints[parameter]))
        if hasattr(kind, "_fields")
    }

    def run(*tensors, **named):
        given = dict(zip(names, tensors, strict=False)) | named
        for parameter, kind in tuples.items():
            given[parameter] = kind(*given[parameter]) if given[parameter] else None
        op(**given)

    def annotated(parameter: inspect.Parameter) -> inspect.Parameter:
        hint = hints[parameter.name]
        if parameter.name in tuples:
            return parameter.replace(annotation=_List[Tensor | None], default=inspect.Parameter.empty)
        if typing.get_origin(hint) is Sequence:
            hint = _List[typing.get_args(hint)]
        return parameter.replace(annotation=hint)

    parameters = [annotated(parameter) for parameter in signature.parameters.values()]
    run.__signature__ = inspect.Signature(parameters, return_annotation=None)
    _library.define(name + torch.library.infer_schema(run, mutates_args=writes))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vispec::{name}", lambda *_, **__: None, lib=_library)
    operator = getattr(torch.ops.vispec, name)

    def traced(*tensors, **named):
        given = dict(zip(names, tensors, strict=False)) | named
        for parameter in tuples:
            given[parameter] = list(given.get(parameter) or ())
        operator(**given)

    torch.compiler.substitute_in_graph(op, skip_signature_check=True)(traced)


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
        "arrivals",
        "next_ancestors",
        "next_hidden",
    ),
)
register(build_tree, writes=("tokens", "parents", "depths", "ancestors", "scores"))
register(accept, writes=("finished", "path", "emitted", "counts", "status", "log_probabilities"))
register(commit, writes=("tensors", "rows", "gather"))
register(adaptor, writes=("output",))
register(tree_attention, writes=("keys", "values", "output"))
register(path_attention, writes=("output",))
register(rope_append, writes=("keys", "values", "output"))
register(rms_norm, writes=("output", "residual"))
register(silu_mul, writes=("output",))
register(int8_linear, writes=("output",))
