"""The output schema and the words of an error: what users script against."""

import pyarrow as pa
import pytest

from pipelines.rows import (
    ERROR_TYPES,
    STAGES,
    output_schema,
    row_error,
)

SUMMARY = pa.schema([("summary", pa.large_string())])


def test_the_output_schema() -> None:
    kept = pa.schema([("year", pa.int64())])
    told = [(f.name, str(f.type), f.nullable) for f in output_schema(SUMMARY, kept)]
    assert told == [
        ("id", "string", False),
        ("summary", "large_string", True),
        ("num_tokens_in", "int32", True),
        ("num_tokens_out", "int32", True),
        ("num_windows", "int32", True),
        ("truncated", "bool", True),
        ("coverage", "double", True),
        ("error", "struct<stage: string, type: string, message: string>", True),
        ("year", "int64", True),
    ]


def test_the_words_of_an_error() -> None:
    assert STAGES == ("read", "tokenize", "generate", "write")
    assert ERROR_TYPES == (
        "NullText",
        "EmptyText",
        "TooLong",
        "NonFinite",
        "OutOfMemory",
        "WorkerDied",
        "ModelError",
        "ReadError",
    )
    assert list(row_error("read", "NullText", "m")) == ["stage", "type", "message"]
    with pytest.raises(AssertionError):
        row_error("reading", "NullText", "m")
    with pytest.raises(AssertionError):
        row_error("read", "Null", "m")
