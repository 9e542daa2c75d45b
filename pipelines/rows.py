"""What users script against: the Arrow schema of the output and the JSON files beside it."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

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


@dataclass(frozen=True)
class InputColumn:
    """What a task reads of every row, as `__ROLE`: a text, or a list of words.

    columns: where it comes from; several texts are joined by `separator`, and null parts left out.
        `a.b` is the field `b` of a struct `a`.
    prefix: a text put before it.
    """

    role: str
    columns: tuple[str, ...]
    kind: Literal["text", "words"] = "text"
    separator: str = "\n\n"
    prefix: str = ""

    @property
    def is_composed(self) -> bool:
        """Tell whether the text is made of more than one column as it stands."""
        return len(self.columns) > 1 or bool(self.prefix)


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
