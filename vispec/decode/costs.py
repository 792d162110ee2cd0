"""What a pass costs by its size, learned from passes that ran."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median_low

KEPT_SAMPLES = 9
# How far one sample of a size that is known well moves the level of the whole curve.
DRIFT = 0.4
# Samples after which a size is known well, the times that a sample may deviate before it is a surprise, and surprises
# in a row, all up or all down, that make a new level. A surprise counts for nothing else: the shape must not take a
# change of the level for its own, since it would keep it when the level changes back.
WELL_KNOWN, SURPRISING, NEW_LEVEL = 3, 1.5, 3


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
        self._surprises: list[float] = []
        self._passes = 0

    def add(self, size: int, seconds: float) -> None:
        """Learns that a pass over `size` rows took so long."""
        self._passes += 1
        if not self._shape:
            self._level = seconds
        elif self._is_surprising(size, seconds):
            return
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

    def _is_surprising(self, size: int, seconds: float) -> bool:
        """Whether a sample deviates so far that it may be a new level's; the level follows one that does not."""
        well_known = size in self._shape and len(self._shape[size].values) >= WELL_KNOWN
        # After a surprise even a guess can tell whether it goes on.
        if not (well_known or self._surprises):
            return False
        deviation = seconds / self(size)
        if 1 / SURPRISING < deviation < SURPRISING:
            self._surprises.clear()
            if well_known:
                self._level *= deviation**DRIFT
            return False
        if self._surprises and (self._surprises[0] > 1) != (deviation > 1):
            self._surprises.clear()
        self._surprises.append(deviation)
        if len(self._surprises) == NEW_LEVEL:
            self._level *= sorted(self._surprises)[NEW_LEVEL // 2]
            self._surprises.clear()
        return True

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
