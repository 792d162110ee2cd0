from __future__ import annotations

import pytest

from tests.ops.conftest import REQUIRED, Backend, why_missing


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request) -> Backend:
    """The backends that run the CUDA sources."""
    reason = why_missing(request.param)
    if reason is not None:
        if request.param in REQUIRED:
            pytest.fail(f"VISPEC_TEST_REQUIRE names {request.param}, but {reason}")
        pytest.skip(reason)
    return Backend(request.param)


@pytest.fixture
def oracle() -> Backend:
    return Backend("reference")
