from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where the test programs of this run are compiled to."""
    return tmp_path_factory.mktemp("emulator")
