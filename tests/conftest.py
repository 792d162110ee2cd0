"""Where the emulated kernels come from, and what was skipped."""

from __future__ import annotations

import os

import pytest

import vispec
from tests.ops.conftest import Backend, available

# A build of the emulated module in another folder (`make asan`) takes the place of the installed one.
if folder := os.environ.get("VISPEC_EMULATED_FOLDER"):
    vispec.__path__.insert(0, folder)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request) -> Backend:
    """The backends that run the CUDA sources."""
    return available(request.param)


def pytest_terminal_summary(terminalreporter):
    """How many tests were skipped for each reason, one line a reason."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
