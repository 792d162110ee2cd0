"""What a run shows: progress of collecting, a live table of training, a CSV file, TensorBoard where it is installed."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "feature",
    "cross_entropy",
    "distance",
    "ranking",
    "learning_rate",
    "gradient_norm",
    "rows",
    "tokens",
    "skipped",
    "seconds",
    "target_share",
)
SHOWN_ROWS = 12


@contextmanager
def collect_progress(
    console: Console | None, done: int, total: int
) -> Iterator[Callable[[int, float, dict[str, Any]], None]]:
    """Yields `update(requests done, tokens a second, totals)`: a bar on a terminal, else one line a shard."""
    if console is None:
        yield lambda *_: None
        return

    started = time.perf_counter()

    def words(rate: float, totals: dict[str, Any]) -> str:
        skipped = sum(totals["skipped"].values())
        cut = totals["cut_answers"]
        return f"{totals['answer_tokens']} tokens, {rate:.1f} tokens/s, {cut} cut, {skipped} skipped"

    if not console.is_terminal:

        def line(index: int, rate: float, totals: dict[str, Any]) -> None:
            left = (total - index) * (time.perf_counter() - started) / max(1, index - done)
            console.print(f"{index}/{total} requests, {words(rate, totals)}, {left:.0f} s left", highlight=False)

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, completed=done, words="")
        yield lambda index, rate, totals: bar.update(task, completed=index, words=words(rate, totals))


class TrainingLog:
    """Rows of a training run: all of them to `log.csv`, the latest ones to a table.

    Args:
        step: rows of later steps, which a killed run left behind its checkpoint, are dropped.
        console: None: nothing is shown.
    """

    def __init__(self, folder: Path, step: int, console: Console | None) -> None:
        self.path = folder / "log.csv"
        self._rows = [row for row in self._read() if int(row["step"]) <= step]
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self._rows)
        self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._board = _board(folder / "tensorboard", step)
        self._console = console
        self._live: Live | None = None
        if console is not None and console.is_terminal:
            self._live = Live(self._table(), console=console, auto_refresh=False)
            self._live.start()

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            # A killed run may leave half a line.
            return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]

    def add(self, row: dict[str, Any]) -> None:
        """Adds one row with the names of `COLUMNS`; None where nothing was computed."""
        written = {name: _written(value) for name, value in row.items()}
        self._writer.writerow(written)
        self._file.flush()
        self._rows.append(written)
        if self._board is not None:
            for name in COLUMNS[2:]:
                if row[name] is not None:
                    self._board.add_scalar(name, row[name], row["step"])
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        elif self._console is not None:
            shown = ", ".join(f"{name} {written[name]}" for name in ("step", "loss", "learning_rate", "rows"))
            self._console.print(shown, highlight=False)

    def say(self, message: str) -> None:
        """Prints a line beside the table."""
        if self._console is not None:
            self._console.print(message, highlight=False)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._live is not None:
            self._live.stop()

    def _table(self) -> Table:
        table = Table()
        for name in COLUMNS:
            table.add_column(name.replace("_", " "), justify="right")
        for row in self._rows[-SHOWN_ROWS:]:
            table.add_row(*(row[name] for name in COLUMNS))
        return table


def _written(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
