"""What users script against: the Arrow schema of the output and the JSON files beside it."""

from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

# Raised when the same input and options would give other rows than the release before.
OUTPUT_VERSION = 1

STAGES = ("read", "tokenize", "generate", "write")
ERROR_TYPES = (
    "NullText",
    "EmptyText",  # blank counts
    "TooLong",
    "NonFinite",
    "OutOfMemory",
    "WorkerDied",
    "ModelError",
    "ReadError",  # a page of the input that does not decode
)
ERROR = pa.struct(
    [
        pa.field("stage", pa.string()),
        pa.field("type", pa.string()),
        pa.field("message", pa.string()),
    ]
)
COUNT_FIELDS = (
    pa.field("num_tokens_in", pa.int32()),
    pa.field("num_tokens_out", pa.int32()),
    pa.field("num_windows", pa.int32()),
    pa.field("truncated", pa.bool_()),
    pa.field("coverage", pa.float64()),
    pa.field("error", ERROR),
)

State = Literal["validating", "running", "finalizing", "completed", "failed", "cancelled"]


def output_schema(task_columns: pa.Schema, kept: pa.Schema) -> pa.Schema:
    """The schema of `output/`: id, the task's columns, counts and error, the kept columns."""
    return pa.schema(
        [pa.field("id", pa.string(), nullable=False), *task_columns, *COUNT_FIELDS, *kept]
    )


def row_error(stage: str, kind: str, message: str) -> dict[str, str]:
    """A value of the `error` column."""
    assert stage in STAGES, stage
    assert kind in ERROR_TYPES, kind
    return {"stage": stage, "type": kind, "message": message}


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RowCounts(StrictModel):
    """`in` is a Python keyword, hence the alias."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    rows_in: int = Field(0, alias="in")
    ok: int = 0
    failed: int = 0


class ManifestRows(RowCounts):
    truncated: int = 0


class TokenCounts(StrictModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    tokens_in: int = Field(0, alias="in")
    out: int = 0


class Status(StrictModel):
    """status.json."""

    status: State
    run_id: str
    attempt: int
    rows: RowCounts = RowCounts()
    tokens: TokenCounts = TokenCounts()
    started: float
    updated: float
    message: str = ""


class InputEntry(StrictModel):
    path: str
    rows: int
    bytes: int


class SkippedEntry(StrictModel):
    path: str
    reason: str


class FileEntry(StrictModel):
    path: str
    rows: int
    bytes: int
    xxh64: str


class Manifest(StrictModel):
    """_manifest.json: readers take the files listed here, once `_SUCCESS` stands beside it."""

    schema_version: Literal[1] = 1
    run_id: str
    status: State
    fingerprint: dict[str, Any]
    rows: ManifestRows
    errors: dict[str, int]
    tokens: TokenCounts
    timings: dict[str, float]
    versions: dict[str, str]
    input: list[InputEntry]
    skipped: list[SkippedEntry]
    files: list[FileEntry]
