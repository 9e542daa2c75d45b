"""Words for what is wrong with an input."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import pyarrow as pa

T = TypeVar("T")

NUM_NAMED = 5  # how many offending rows or files a message names
_LONGEST = 300


def attempt(call: Callable[[], T]) -> T | Exception:
    """The result of a reading, or why it failed."""
    try:
        return call()
    except (OSError, ValueError, pa.ArrowException) as error:
        return error


def named(names: Sequence[str], most: int = NUM_NAMED) -> str:
    listed = ", ".join(map(repr, names[:most]))
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def one_line(error: Exception) -> str:
    """The first line of what an error says, without the rest of a long row that it may quote."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= _LONGEST else f"{lines[0][:_LONGEST]}…"
