"""Times on a GPU: replays of a CUDA graph that holds many calls, and what the same GPU can do at most."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GRAPH_MICROSECONDS = 2000
LEAST_CALLS, MOST_CALLS = 50, 200


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
        with _Elapsed(stream) as once:
            for call in calls:
                call()
    wanted = min(MOST_CALLS, max(LEAST_CALLS, GRAPH_MICROSECONDS * len(calls) / once.microseconds))
    rounds = math.ceil(wanted / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    count = rounds * len(calls)
    found = []
    with torch.cuda.stream(stream):
        for _ in range(replays):
            # The first keeps the GPU busy until the second has arrived, so that no launch is in the time.
            graph.replay()
            with _Elapsed(stream) as replay:
                graph.replay()
            found.append(replay.microseconds / count)
    return Timing(statistics.median(found), min(found), max(found), count, replays)


class _Elapsed:
    """The time that the stream spends on the work queued inside the block."""

    microseconds: float

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __enter__(self) -> _Elapsed:
        self.start.record(self.stream)
        return self

    def __exit__(self, *failure: object) -> None:
        self.end.record(self.stream)
        self.end.synchronize()
        self.microseconds = self.start.elapsed_time(self.end) * 1000


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
