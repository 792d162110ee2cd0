"""Work that is replayed as a CUDA graph, timed and read without waiting for it."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vispec.decode.fingerprint import Fingerprint

# Calls that run call by call before the capture, in which libraries choose algorithms and allocate workspaces.
WARM_UP_CALLS = 2
# Results under way that the host does not yet ask for.
LATE_ROUNDS = 1

# PyTorch allows one capture at a time in a process.
_capturing = threading.Lock()
# Libraries keep one workspace a stream. Graphs for different streams may run at the same time, so that each of these
# has a stream of its own to capture on.
_capture_streams: dict[tuple[int, int], torch.cuda.Stream] = {}


def can_capture(device: torch.device) -> bool:
    """Whether work on this device can become a graph."""
    return device.type == "cuda"


def capture(function: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the function's work, and the tensor that holds the function's result after each replay.

    `pool` is the memory of an earlier graph, to be shared with it, or None. Nothing is computed.
    """
    graph, caller = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with _capturing:
        key = caller.device_index, caller.cuda_stream
        if key not in _capture_streams:
            _capture_streams[key] = torch.cuda.Stream()
        with torch.cuda.graph(graph, pool=pool, stream=_capture_streams[key], capture_error_mode="thread_local"):
            result = function()
    return graph, result


class Replayed:
    """A function over buffers that stay where they are, captured as a CUDA graph after its first calls.

    Where the work cannot be captured (a model that reads a value back in its forward pass, for example) it goes on
    call by call, and a warning says so. The function itself is not kept: each call brings it along.

    Args:
        name: of the model, for the warning.

    Attributes:
        graph: what is replayed; None before the capture.
        fingerprint: what the model was like at the capture, None before it.
        settled: whether calls run as they always will: replayed, or never to be captured.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._name = name
        self._capture = can_capture(device)
        self._calls = 0
        self._result: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.fingerprint: Fingerprint | None = None

    @property
    def settled(self) -> bool:
        return self.graph is not None or not self._capture

    def __call__(self, function: Callable[[], Tensor], fingerprint: Callable[[], Fingerprint], pool: Any) -> Tensor:
        """Does the function's work and returns its result, which the next call overwrites."""
        self._calls += 1
        if not self.settled and self._calls > WARM_UP_CALLS:
            self._try_capture(function, fingerprint(), pool)
        if self.graph is None:
            return function()
        self.graph.replay()
        return self._result

    def _try_capture(self, function: Callable[[], Tensor], fingerprint: Fingerprint, pool: Any) -> None:
        self.fingerprint = fingerprint
        try:
            self.graph, self._result = capture(function, pool)
        except RuntimeError as error:
            self._capture = False
            warnings.warn(
                f"fast_generate: a round of {self._name} cannot be captured as a CUDA graph; it runs call by call, "
                f"with the same answers ({str(error).splitlines()[0]})",
                stacklevel=2,
            )


class Moment:
    """A point in the device's work, behind all that was enqueued so far."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()
        # On a CPU work is done when a call returns.
        self._seconds = time.perf_counter()

    def until(self, later: Moment) -> float:
        """Seconds between two points that the device has passed."""
        if self._event is None:
            return later._seconds - self._seconds
        return self._event.elapsed_time(later._event) / 1e3


class Due(NamedTuple):
    """A result on the host, and what `LateReader.push` was told of it."""

    rows: list[list[int]]
    note: Any


class LateReader:
    """Copies small int64 tensors to the host while the device goes on."""

    def __init__(self) -> None:
        self._free: dict[torch.Size, list[Tensor]] = {}
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, Any]] = deque()

    def push(self, result: Tensor, note: Any = None) -> None:
        """Enqueues the copy of `result` behind the work that makes it; `note` comes back with it."""
        free = self._free.setdefault(result.shape, [])
        place = free.pop() if free else torch.empty_like(result, device="cpu", pin_memory=result.is_cuda)
        place.copy_(result, non_blocking=True)
        event = None
        if result.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending.append((place, event, note))

    def due(self) -> Due | None:
        """The oldest result once more than `LATE_ROUNDS` are under way, else None; waits for that one alone."""
        if len(self._pending) <= LATE_ROUNDS:
            return None
        place, event, note = self._pending.popleft()
        if event is not None:
            event.synchronize()
        self._free[place.shape].append(place)
        return Due(place.tolist(), note)
