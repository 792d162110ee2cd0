"""What the pictures in docs/ have in common: matplotlib may be missing, and an SVG holds the numbers it shows."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_plotting(asked: str) -> None:
    """Raises SystemExit where matplotlib, which the option `asked` needs, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit(f"{asked} needs the package matplotlib: pip install matplotlib")


@contextmanager
def picture(path: Path, name: str, size: tuple[float, float], numbers: Any) -> Iterator[Any]:
    """A figure to draw on, `size` in inches, saved behind the block as SVG or PNG.

    An SVG's text stays text, equal numbers give an equal file, and its description is `numbers` as JSON.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        about = {"Description": json.dumps(numbers), "Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=120, metadata=about)
