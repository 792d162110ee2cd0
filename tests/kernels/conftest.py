from __future__ import annotations

import pytest

from tests.ops.conftest import Backend


@pytest.fixture
def oracle() -> Backend:
    return Backend("reference")
