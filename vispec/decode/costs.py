"""What a pass costs by its size, learned from passes that ran."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median_low

KEPT_SAMPLES = 9
# How far one sample moves the level of the whole curve, and the most of a deviation that it may claim. Fast against
# the samples of a shape, or the shape would take a change of the level for its own.
DRIFT, LARGEST_DEVIATION = 0.4, 2.0


@dataclass
class _Samples:
    last: int
    values: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_SAMPLES))

    @property
    def typical(self) -> float:
        # Of two samples the smaller: what else runs on the machine only ever adds time.
        return median_low(self.values)


class CostCurve:
    """Seconds of a pass over a number of rows, as a level that drifts times a shape that stays.

    A machine that gets busy, or a context that grows, slows passes of all sizes alike; keeping the level apart
    from the shape lets one size's samples speak for the others. The shape need not be smooth nor rise: matrix
    kernels change with the number of rows.

    Args:
        optimism: guesses are multiplied by it; below 1 a size that may be worth it is tried once.
        forgotten_after: passes, for each sample that is kept of a size, after which that size is a guess again where it
            has not run; None: never.
    """

    def __init__(self, optimism: float, forgotten_after: int | None = None) -> None:
        self._optimism = optimism
        self._forgotten_after = forgotten_after
        self._shape: dict[int, _Samples] = {}
        self._level = 1.0
        self._passes = 0

    def add(self, size: int, seconds: float) -> None:
        """Learns that a pass over `size` rows took so long."""
        self._passes += 1
        if not self._shape:
            self._level = seconds
        elif size in self._shape:
            deviation = seconds / self(size)
            self._level *= min(max(deviation, 1 / LARGEST_DEVIATION), LARGEST_DEVIATION) ** DRIFT
        samples = self._shape.setdefault(size, _Samples(self._passes))
        samples.last = self._passes
        samples.values.append(seconds / self._level)
        if self._forgotten_after is not None:
            # A figure from one pass may be a hiccup; the more passes stand behind it, the longer it is believed.
            self._shape = {
                size: samples
                for size, samples in self._shape.items()
                if samples.last + self._forgotten_after * len(samples.values) > self._passes
            }

    def measured(self, size: int) -> bool:
        """Whether there is a figure for this size that is not too old."""
        return size in self._shape

    @property
    def largest(self) -> int:
        """The largest size with a figure, 0 where there is none."""
        return max(self._shape, default=0)

    def __call__(self, size: int) -> float:
        """Seconds of a pass over `size` rows, measured or guessed from the sizes beside it.

        Raises: ValueError before the first sample.
        """
        if not self._shape:
            raise ValueError("costs: a pass must have been measured, got none")
        if size in self._shape:
            return self._level * self._shape[size].typical
        below = max((known for known in self._shape if known < size), default=None)
        above = min((known for known in self._shape if known > size), default=None)
        if below is None:
            return self._level * self._shape[above].typical * self._optimism
        start = self._shape[below].typical
        if above is None:
            # Beyond all figures: half the slope of the whole curve, so that it is tried unless it is hopeless.
            smallest = min(self._shape)
            slope = max(start - self._shape[smallest].typical, 0.0) / max(below - smallest, 1)
            return self._level * (start + slope * (size - below) / 2)
        share = (size - below) / (above - below)
        return self._level * (start + share * (self._shape[above].typical - start)) * self._optimism
