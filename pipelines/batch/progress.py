"""How far a run is, for people: a live bar on a terminal, a line every ten seconds elsewhere.

Talk goes to stderr; stdout is for results.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipelines.batch.ledger import Tally
from pipelines.batch.worker_process import Throttle

_LINE_INTERVAL_S = 10.0


class Show(Protocol):
    def __call__(self, total: Tally) -> None: ...


class Rate:
    """Rows and tokens per second of this attempt, from its first row on."""

    def __init__(self, rows_in: int, before: Tally) -> None:
        self.rows_in, self.before = rows_in, before
        self._started = time.monotonic()

    def describe(self, total: Tally) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rows = (total.rows - self.before.rows) / seconds
        tokens = (total.tokens_in - self.before.tokens_in) / seconds
        left = (self.rows_in - total.rows) / rows if rows > 0 else None
        eta = "-" if left is None else _clock(left)
        return f"{tokens:,.0f} tokens/s, {total.failed} failed, ETA {eta}"


def _clock(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{whole:02d}"


@contextmanager
def show_progress(rows_in: int, before: Tally) -> Iterator[Show]:
    """What to call with every new total."""
    rate = Rate(rows_in, before)
    if not sys.stderr.isatty():
        yield _lines(rows_in, rate)
        return
    columns = (
        TextColumn("documents"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=rows_in, completed=before.rows, rate="")
        yield lambda total: bar.update(task, completed=total.rows, rate=rate.describe(total))


def _lines(rows_in: int, rate: Rate) -> Show:
    line = Throttle(_LINE_INTERVAL_S)

    def show(total: Tally) -> None:
        if line.is_due():
            done = f"{total.rows}/{rows_in} documents"
            print(f"{done}, {rate.describe(total)}", file=sys.stderr, flush=True)

    return show
