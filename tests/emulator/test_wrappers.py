"""Every wrapper of csrc/rt.h against plain arithmetic: on the emulator, and on a GPU if any."""

from __future__ import annotations

import pytest
import torch

from tests.emulator import programs


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wrappers_on_the_emulator(folder, seed):
    done = programs.call(programs.build("wrappers", "address", folder), seed=seed)
    assert done.returncode == 0, done.stderr


def test_wrappers_on_the_gpu(folder):
    if not torch.cuda.is_available() or programs.nvcc() is None:
        pytest.skip("no CUDA device" if programs.nvcc() else "no nvcc")
    done = programs.call(programs.build_cuda("wrappers", folder))
    assert done.returncode == 0, done.stderr
