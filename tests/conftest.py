"""Where the emulated kernels come from."""

from __future__ import annotations

import os

import vispec

# A build of the emulated module in another folder (`make asan`) takes the place of the installed one.
if folder := os.environ.get("VISPEC_EMULATED_FOLDER"):
    vispec.__path__.insert(0, folder)
