from __future__ import annotations

import pytest

from tests.ops.conftest import Backend, available


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request) -> Backend:
    """The backends that run the CUDA sources."""
    return available(request.param)


@pytest.fixture
def oracle() -> Backend:
    return Backend("reference")
