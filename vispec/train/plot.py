"""The figures of an evaluation as one picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

DOTS_PER_INCH = 120


def check_plotting() -> None:
    """Raises ImportError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("eval: --plot needs the package matplotlib: pip install matplotlib")


def plot_figures(found: dict[str, Any], path: Path) -> None:
    """Draws acceptance by depth, the drafted share by kind of word and tokens a round by kind of picture, as PNG.

    Args:
        found: what `evaluate` returned; one colour a temperature.
    """
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    depths, words, kinds = figure.subplots(1, 3)
    temperatures = found["temperatures"]
    for place, (temperature, figures) in enumerate(temperatures.items()):
        label = f"T = {temperature}, tau {figures['tau']:.2f}"
        shares = figures["acceptance_by_depth"]
        depths.plot(range(1, len(shares) + 1), shares, marker="o", label=label)
        by_word = {name: group["drafted_share"] for name, group in figures["by_word"].items()}
        by_kind = {name: group["tokens_per_round"] for name, group in figures["by_kind"].items()}
        for axes, bars in ((words, by_word), (kinds, by_kind or {"all": figures["tokens_per_round"]})):
            width = 0.8 / len(temperatures)
            axes.bar([index + place * width for index in range(len(bars))], list(bars.values()), width, label=label)
            middle = (len(temperatures) - 1) * width / 2
            axes.set_xticks([index + middle for index in range(len(bars))], list(bars))
    depths.set(title="accepted, of those that accepted the depth before", xlabel="depth", ylim=(0, 1))
    words.set(title="share of tokens that were drafted", ylim=(0, 1))
    kinds.set(title="tokens a round")
    depths.legend()
    figure.savefig(path, dpi=DOTS_PER_INCH, format="png")
