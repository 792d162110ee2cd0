"""Times on a GPU: replays of a CUDA graph that holds many calls, and what the same GPU can do at most."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GRAPH_MICROSECONDS = 2000
MOST_CALLS = 200


@dataclass(frozen=True)
class Timing:
    """One call, in microseconds."""

    microseconds: float
    """The median of the replays."""
    fastest: float
    slowest: float
    calls: int
    replays: int


def time_calls(calls: Sequence[Callable[[], Any]], replays: int) -> Timing:
    """The time of one call, from replays of a CUDA graph in which all calls take turns.

    A graph leaves out the launches from the host, and many calls in one leave out its own start. What remains between
    two calls is what remains between two kernels of a captured round.

    Raises:
        Whatever a call raises, also because it cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Loads modules, compiles, and fills the allocator's pools, none of which may happen during capture.
        for _ in range(3):
            for call in calls[:2]:
                call()
        one = _elapsed_microseconds(stream, lambda: [call() for call in calls]) / len(calls)
    rounds = math.ceil(min(MOST_CALLS, max(1, GRAPH_MICROSECONDS / one)) / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    count = rounds * len(calls)
    with torch.cuda.stream(stream):
        graph.replay()
        found = [_elapsed_microseconds(stream, graph.replay) / count for _ in range(replays)]
    return Timing(statistics.median(found), min(found), max(found), count, replays)


def _elapsed_microseconds(stream: torch.cuda.Stream, work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) * 1000


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at most, measured in the same run as the ops."""

    copy_gigabytes_per_second: float
    """A device-to-device copy of 1 GiB, bytes read plus bytes written."""
    matmul_teraflops: float
    """A bfloat16 product of two random 8192 x 8192 matrices."""
    smallest_kernel_microseconds: float
    """One number incremented: what a kernel takes that does nothing."""
    l2_bytes: int

    def floor(self, bytes_moved: int, operations: int) -> tuple[float, str]:
        """The time in microseconds that no version can beat by much, and what sets it."""
        by_bytes = bytes_moved / self.copy_gigabytes_per_second / 1000
        by_operations = operations / self.matmul_teraflops / 1e6
        return (by_operations, "operations") if by_operations > by_bytes else (by_bytes, "bytes")

    def copies_for_cold(self, bytes_moved: int) -> int:
        """How many sets of inputs must take turns, so that none is left in the L2 cache when its turn comes."""
        return math.ceil(3 * self.l2_bytes / bytes_moved) + 1


def measure_ceilings(replays: int) -> Ceilings:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], replays)
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = torch.empty_like(left)
    matmul = time_calls([lambda: torch.mm(left, right, out=product)], replays)
    number = torch.zeros(1, device="cuda")
    smallest = time_calls([lambda: number.add_(1)], replays)
    return Ceilings(
        copy_gigabytes_per_second=2 * (1 << 30) / copy.microseconds / 1000,
        matmul_teraflops=2 * 8192**3 / matmul.microseconds / 1e6,
        smallest_kernel_microseconds=smallest.microseconds,
        l2_bytes=torch.cuda.get_device_properties(0).L2_cache_size,
    )
