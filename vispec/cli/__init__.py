"""The command line: `vispec generate`, `vispec demo`, `vispec doctor`."""

from vispec.cli.entry import main

__all__ = ["main"]
