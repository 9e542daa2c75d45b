"""What all metrics have in common: checks, failed rows, missing libraries, no downloads."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longformer_core import metrics
from longformer_core.errors import ConfigError, LongformerError, ShapeError

# Each function, a good prediction and its reference.
CASES: list[tuple[Callable[..., metrics.Scores], Any, Any]] = [
    (metrics.score_summaries, "one two", "one three"),
    (metrics.score_answers, "one", ["one"]),
    (metrics.score_classes, "a", "a"),
    (metrics.score_choices, 1, 1),
    (metrics.score_label_sets, ["a"], ["a", "b"]),
    (metrics.score_spans, [("PER", 0, 3)], [("PER", 0, 3)]),
    (metrics.score_values, 1.5, 2.0),
    (metrics.score_perplexity, 3.0, 4),
    (metrics.score_rankings, ["x", "y"], ["y"]),
]
each = pytest.mark.parametrize(
    ("score", "prediction", "reference"), CASES, ids=lambda v: getattr(v, "__name__", "")
)


@each
def test_rows_must_pair_up(score: Any, prediction: Any, reference: Any) -> None:
    with pytest.raises(ShapeError, match="2 predictions against 1 references"):
        score([prediction, prediction], [reference])
    with pytest.raises(ShapeError, match="no rows"):
        score([], [])
    with pytest.raises(ShapeError, match="row 1 has no reference"):
        score([prediction, prediction], [reference, None])
    with pytest.raises(ShapeError, match="not a str"):
        score("text", [reference])
    with pytest.raises(ValueError, match="prediction of row 1"):
        score([prediction, {1: 2}], [reference, reference])


@each
def test_a_failed_row_is_counted_and_scores_nothing(
    score: Any, prediction: Any, reference: Any
) -> None:
    scores = score([prediction, None], [reference, reference])
    assert scores.num_failed == 1
    alone = score([prediction], [reference])
    assert alone.num_failed == 0
    assert scores.per_row[0] == alone.per_row[0]
    assert not any(scores.per_row[1].values())
    if scores.per_row[1]:
        for name, value in scores.per_row[0].items():
            if name in scores.summary and name not in ("f1", "precision"):
                assert scores.summary[name] == pytest.approx(value / 2), name
    else:
        assert scores.summary == alone.summary


@each
def test_numbers_are_plain_floats_and_repeat(score: Any, prediction: Any, reference: Any) -> None:
    first = score([prediction] * 3, [reference] * 3)
    assert first == score([prediction] * 3, [reference] * 3)
    values = [*first.summary.values(), *(v for row in first.per_row for v in row.values())]
    assert {type(value) for value in values} == {float}


@pytest.mark.parametrize(
    ("library", "call"),
    [
        ("rouge_score.rouge_scorer", lambda: metrics.score_summaries(["a"], ["a"])),
        ("sklearn.metrics", lambda: metrics.score_classes(["a"], ["a"])),
        ("sklearn.metrics", lambda: metrics.score_label_sets([["a"]], [["a"]])),
        ("scipy.stats", lambda: metrics.score_values([1.0, 2.0], [1.0, 2.0])),
        ("seqeval.metrics.sequence_labeling", lambda: metrics.spans_of_tags(["B-PER"])),
    ],
)
def test_a_missing_library_names_the_extra(
    library: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r"pip install 'longhaul\[metrics\]'") as caught:
        call()
    assert library.partition(".")[0] in str(caught.value)
    assert isinstance(caught.value, LongformerError)


def test_nothing_is_imported_before_use_and_nothing_is_downloaded(tmp_path: Path) -> None:
    script = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"a metric wants the network: {args}")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from longformer_core import metrics as m
heavy = {"rouge_score", "nltk", "sklearn", "scipy", "seqeval"} & set(sys.modules)
assert not heavy, heavy
m.score_summaries(["Dogs ran. Cats sat."], ["Dogs run. Cats sit."])
m.score_classes(["a"], ["b"])
m.score_label_sets([["a"]], [["b"]])
m.score_values([1.0, 2.0], [2.0, 1.0])
m.spans_of_tags(["B-PER", "O"])
assert {"rouge_score", "nltk", "sklearn", "scipy", "seqeval"} <= set(sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.rglob("*nltk*")) == []
