"""One process or several: Accelerate where it was launched with several, nothing otherwise."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor


class Processes:
    """The processes of one training run.

    Attributes:
        rank: number of this process.
        count: number of processes.
        device: this process's own device, None where there is only one process (the model's device is kept).
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = 0
        self.device: torch.device | None = None
        self._accelerator: Any = None
        if self.count > 1:
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise ImportError(
                    "fit: several processes need the package accelerate: pip install accelerate"
                ) from error
            self._accelerator = Accelerator()
            if self._accelerator.num_processes != self.count:
                raise ValueError(
                    f"fit: processes must be {self.count} as WORLD_SIZE says, got {self._accelerator.num_processes}"
                )
            self.rank = self._accelerator.process_index
            self.device = self._accelerator.device

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over all processes, the same bits in each."""
        return values if self._accelerator is None else self._accelerator.reduce(values, reduction="sum")

    def wait(self) -> None:
        """Waits until every process is here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Ends the process group."""
        if self._accelerator is not None:
            self._accelerator.end_training()
