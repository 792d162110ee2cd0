"""tree_attention against float64, on the emulator and on a GPU if any."""

from __future__ import annotations

import pytest
import torch

from tests.emulator import programs


@pytest.mark.parametrize("seed", [0, 1])
def test_attention_on_the_emulator(folder, seed):
    program = programs.build("attention", "address", folder, kernels=["tree_attention.cu"])
    done = programs.call(program, seed=seed)
    assert done.returncode == 0, done.stderr


def test_attention_on_the_gpu(folder):
    if not torch.cuda.is_available() or programs.nvcc() is None:
        pytest.skip("no CUDA device" if programs.nvcc() else "no nvcc")
    program = programs.build_cuda("attention", folder, kernels=["tree_attention.cu"])
    done = programs.call(program)
    assert done.returncode == 0, done.stderr
