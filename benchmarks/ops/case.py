"""What a case of the op benchmark is: one op at one size, its exact answer, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

INTEGER_POISON = -(1 << 62) + 12345


class WrongAnswer(Exception):
    """An op or a baseline did not compute what it should."""


@dataclass(frozen=True)
class Baseline:
    """Another way to the same answer."""

    name: str
    prepare: Callable[[], Callable[[], Any]]
    """Gives the call to time, after imports and set-up; may raise, which is recorded."""
    error: Callable[[Any], float]
    """The largest error of what the call returned; raises WrongAnswer."""
    compiles: bool = False
    """Whether the first call compiles, which takes seconds to minutes."""


@dataclass
class Problem:
    """The tensors of one case, made for one device."""

    run: Callable[[], None]
    """One call of the op. It is captured in a CUDA graph, so it must neither synchronise nor read from the host."""
    outputs: list[Tensor]
    """What the op writes."""
    error: Callable[[], float]
    """The largest error of the outputs against float64, 0 for integers; raises WrongAnswer."""
    error_bound: float
    """What `error` may be: twice PyTorch's own error in the same dtype, 0 for integers."""
    bytes_moved: int
    """Each input read once and each output written once."""
    operations: int = 0
    """Floating-point operations of matrix products."""
    baselines: list[Baseline] = field(default_factory=list)
    restore: Callable[[], None] | None = None
    """For an op that changes its inputs in place: gives them their first values again."""

    def prepare(self) -> None:
        """Poison the outputs, so that one which is not written shows; or restore them."""
        if self.restore is not None:
            self.restore()
            return
        for output in self.outputs:
            output.fill_(torch.nan if output.is_floating_point() else INTEGER_POISON)

    def check(self) -> float:
        """Run the op over poisoned outputs and return its error.

        Raises:
            WrongAnswer: the error is above the bound, or an integer differs.
        """
        self.prepare()
        self.run()
        error = self.error()
        require(error, self.error_bound)
        return error

    def check_baseline(self, baseline: Baseline, call: Callable[[], Any]) -> float:
        """The error of a baseline's answer, which may be coarser than ours, but not another answer.

        Raises:
            WrongAnswer: the error is above ten times the bound, or an integer differs.
        """
        self.prepare()
        error = baseline.error(call())
        require(error, 10 * self.error_bound)
        return error


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    op: str
    name: str
    make: Callable[..., Problem]
    """make(device, generator, **sizes)"""
    sizes: dict[str, Any]
    small: dict[str, Any]
    """Sizes for a check of the answer alone, small enough for an emulated GPU."""
    cold: bool
    """Whether the inputs come from device memory. Otherwise they still lie in the L2 cache, as in a round, where the
    kernel before has just written them."""
    target_microseconds: float | None = None
    """To be reached on an H100."""

    def problem(self, device: str, *, small: bool = False, seed: int = 0) -> Problem:
        """The case's tensors; another seed gives others of the same sizes."""
        generator = torch.Generator(device).manual_seed(20240917 + seed)
        return self.make(torch.device(device), generator, **(self.small if small else self.sizes))


def require(error: float, bound: float) -> None:
    """Require error <= bound; NaN fails."""
    if not error <= bound:
        raise WrongAnswer(f"the largest error is {error:.3g}, the bound {bound:.3g}")


def same(name: str, actual: Tensor, expected: Tensor) -> None:
    """Require equality of integers, or of floats bit for bit."""
    if not torch.equal(actual, expected.to(actual.device)):
        count = int((actual != expected.to(actual.device)).sum())
        raise WrongAnswer(f"{name}: {count} of {actual.numel()} values differ")


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute difference, in float64; NaN if there is one."""
    if actual.shape != exact.shape:
        raise WrongAnswer(f"shape {list(actual.shape)} instead of {list(exact.shape)}")
    return float((actual.double() - exact).abs().max())


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a function for exactly the sizes it meets."""
    return torch.compile(function, dynamic=False)


def forget_compiled() -> None:
    """Makes room for the next case: after several sizes torch.compile would silently run a function uncompiled."""
    compiled.cache_clear()
    torch.compiler.reset()


def eager_and_compiled(
    name: str, function: Callable[..., Any], arguments: tuple, error: Callable[[Any], float]
) -> list[Baseline]:
    """A plain PyTorch function as two baselines: as it is, and through torch.compile."""
    return [
        Baseline(name, lambda: lambda: function(*arguments), error),
        Baseline(f"{name}, compiled", lambda: lambda: compiled(function)(*arguments), error, compiles=True),
    ]
