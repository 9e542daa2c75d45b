"""Every batch task with a small model, rows to read and rows that cannot be read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.cli import longhaul
from jobs.options import exit_code
from pipelines.tasks import task_class
from pipelines.tasks.base import Task
from tests.helpers import corpus_texts
from tests.pipelines.parquet import invalid_utf8, write

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")
LABELS = ("red", "green", "blue")
LIMIT = 256  # tokens that a model reads at once here
_SCORED = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float64())]))
_FILL = pa.list_(
    pa.struct([("token", pa.string()), ("token_id", pa.int32()), ("score", pa.float64())])
)
_ENTITY = pa.struct(
    [
        ("label", pa.string()),
        ("score", pa.float64()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("text", pa.large_string()),
    ]
)


@dataclass(frozen=True)
class Case:
    """A task, and all that is its own.

    head: the published class of its model; None: the LED of all tests.
    columns: input columns, by role. types: of the columns that it writes.
    """

    name: str
    head: str | None
    types: dict[str, pa.DataType]
    columns: dict[str, str] = field(default_factory=lambda: {"text": "text"})
    options: dict[str, Any] = field(default_factory=dict)
    labels: Sequence[str] | None = None


CASES = {
    case.name: case
    for case in (
        Case(
            "summarize",
            None,
            {"summary": pa.large_string()},
            options={"num_beams": 2, "max_new_tokens": 8},
        ),
        Case(
            "answer",
            "LongformerForQuestionAnswering",
            {
                "answer": pa.large_string(),
                "score": pa.float64(),
                "start": pa.int64(),
                "end": pa.int64(),
            },
            columns={"text": "text", "question": "query"},
            options={"question_column": "query", "max_answer_tokens": 12},
        ),
        Case(
            "classify",
            "LongformerForSequenceClassification",
            {"label": pa.string(), "score": pa.float64(), "scores": _SCORED},
            labels=LABELS,
        ),
        Case(
            "tag",
            "LongformerForTokenClassification",
            {"entities": pa.list_(_ENTITY)},
            options={"aggregation": "first"},
            labels=TAGS,
        ),
        Case(
            "choose",
            "LongformerForMultipleChoice",
            {"choice": pa.int32(), "scores": pa.list_(pa.float64())},
            columns={"text": "text", "choices": "choices", "question": "query"},
            options={"question_column": "query"},
        ),
        Case(
            "fill",
            "LongformerForMaskedLM",
            {"fills": pa.list_(_FILL)},
            columns={"text": "cloze"},
            options={"text_column": "cloze", "top_k": 3},
        ),
        Case("embed", "LongformerModel", {"embedding": pa.list_(pa.float32(), 32)}),
    )
}


def good_rows(num_rows: int, num_words: int = 60) -> list[dict[str, Any]]:
    """Rows that every task can read, no two alike: texts of `num_words` and up to 40 words more.

    Short plain words are few tokens in any vocabulary.
    """
    words = " ".join(text[:20_000] for text in corpus_texts(30)).split()
    words = [word for word in words if word.isalpha() and len(word) <= 10]
    rows = []
    for number in range(num_rows):
        start = 37 * number % (len(words) - num_words - 100)
        own = words[start : start + num_words + number % 40]
        cloze = [*own]
        cloze[10:60:25] = ["<mask>"] * len(cloze[10:60:25])
        rows.append(
            {
                "id": f"good {number}",
                "text": " ".join(own),
                "cloze": " ".join(cloze),
                "query": " ".join(own[-8:]) + "?",
                "choices": [" ".join(own[i : i + 5]) for i in (2, 12, 22, 32)],
            }
        )
    return rows


def bad_rows(case: Case) -> dict[str, tuple[dict[str, Any], str]]:
    """Rows that a task must refuse, each with the type of its error, by id."""
    (plain,) = good_rows(1)
    text = case.columns["text"]
    found: dict[str, tuple[dict[str, Any], str]] = {
        "too long": ({text: f"{plain[text]} " * 9}, "TooLong")
    }
    for role, column in case.columns.items():
        if role == "choices":
            found |= {
                "no choices": ({column: None}, "NullText"),
                "a null choice": ({column: ["one", None]}, "NullText"),
                "an empty list": ({column: []}, "EmptyText"),
                "blank choices": ({column: ["", " \n"]}, "EmptyText"),
            }
            continue
        found |= {
            f"null {role}": ({column: None}, "NullText"),
            f"empty {role}": ({column: ""}, "EmptyText"),
            f"blank {role}": ({column: "\u00a0 \n\t\u3000"}, "EmptyText"),
            f"{role} of other bytes": ({column: b"caf\xe9 au lait"}, "ReadError"),
        }
    return {name: (plain | {"id": name} | change, kind) for name, (change, kind) in found.items()}


def write_rows(path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Path:
    """Write rows of dicts as Parquet; bytes become a text that is no UTF-8."""
    columns: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if any(isinstance(value, bytes) for value in values):
            values = [v.encode() if isinstance(v, str) else v for v in values]
            columns[name] = invalid_utf8(values)
        else:
            columns[name] = values
    return write(path, columns, **options)


def make_task(case: Case, model: Path, **options: Any) -> Task:
    kind = task_class(case.name)
    given = kind.options_class(model=str(model), **case.options | options)
    return kind.from_options(given, device="cpu")


def flags(case: Case, model: Path, corpus: Path, output: Path, **options: Any) -> list[str]:
    """What a command line gives to `longhaul`, the command's name first."""
    given = {"input": corpus, "output": output, "model": model, "device": "cpu"}
    given |= case.options | options
    words = [case.name]
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words


def command(words: Sequence[str]) -> int:
    """Run a command of `longhaul` in this process, on its Ray; return its exit code."""
    return exit_code(lambda: longhaul.main([*words], standalone_mode=False))


def assert_same(found: Any, expected: Any, where: str = "row") -> None:
    """Equal but for the rounding of numbers: a batch of other documents sums in another order."""
    if isinstance(expected, np.ndarray):
        expected = expected.tolist()
    if isinstance(expected, float):
        assert abs(found - expected) <= 1e-5 + 1e-4 * abs(expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{where}[{number}]")
    else:
        assert found == expected, where
