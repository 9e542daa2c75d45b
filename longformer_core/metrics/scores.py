"""What every metric returns, and the checks that every metric makes first."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

from longformer_core.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class Scores:
    """The numbers of a whole evaluation and of each of its rows.

    summary: name to number over all rows. per_row: the same for each row, in the order given; a row
    that a metric leaves out has an empty dict. num_failed: how many predictions were None.
    """

    summary: dict[str, float]
    per_row: list[dict[str, float]]
    num_failed: int


def check_rows(
    predictions: Sequence[Any], references: Sequence[Any], kind: Any, reference_kind: Any = None
) -> int:
    """Check that rows pair up and hold what a metric can read; return how many predictions failed.

    `kind` is a type, or several, of each prediction that is not None, and of each reference where
    `reference_kind` is None.
    Raises: ShapeError.
    """
    if isinstance(predictions, str) or isinstance(references, str):
        raise ShapeError("predictions and references are lists with one entry per row, not a str")
    if len(predictions) != len(references):
        raise ShapeError(
            f"{len(predictions)} predictions against {len(references)} references; give one of "
            "each per row, None for a prediction that failed"
        )
    if not len(predictions):
        raise ShapeError("there are no rows to score; give at least one")
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        if reference is None:
            raise ShapeError(f"row {row} has no reference (None); leave the row out")
        if not (prediction is None or isinstance(prediction, kind)):
            raise ShapeError(_unreadable("prediction", row, prediction, kind))
        if not isinstance(reference, reference_kind or kind):
            raise ShapeError(_unreadable("reference", row, reference, reference_kind or kind))
    return sum(prediction is None for prediction in predictions)


def _unreadable(what: str, row: int, value: Any, kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = " or ".join(kind.__name__ for kind in kinds)
    return f"the {what} of row {row} is {value!r:.80}, a {type(value).__name__}; give {names}"


def as_set(values: Any) -> frozenset[Any]:
    """One value, or several, as a set; None is the empty one. A str is one value."""
    return frozenset(as_list(values))


def as_list(values: Any) -> list[Any]:
    """One value, or several, as a list; None is the empty one. A str is one value."""
    if values is None:
        return []
    return [values] if isinstance(values, str) else list(values)


def mean_of_rows(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each name over rows that have the same ones. The order of rows has no effect."""
    return {name: fsum(row[name] for row in rows) / len(rows) for name in rows[0]}


def f1_score(num_shared: int, num_predicted: int, num_expected: int) -> float:
    """The harmonic mean of precision and recall; 1 where nothing is expected nor predicted."""
    if num_predicted == num_expected == 0:
        return 1.0
    return 2 * num_shared / (num_predicted + num_expected)


def import_library(name: str) -> Any:
    """Import a module of the extra `metrics`.

    Raises: ConfigError when it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"this metric needs {name.partition('.')[0]} ({error}); run "
            "pip install 'longhaul[metrics]'"
        ) from error
