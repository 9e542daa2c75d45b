"""What tasks and corpora agree on: the columns a task reads, and the Arrow schema of the output."""

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
    """What a task reads under one role, and the columns of the input it is made of.

    Kind `text` becomes a large_string column: several `columns` are joined by `separator` with
    nulls left out (all null gives null), and `prefix` is put before a text that is not blank.
    Kind `words` is one column of lists of strings: pre-split words, answer choices.
    A column is named by its name, or a field of a struct by its dotted path (`document.body`).
    One that is not `required` is null where the input has none of its columns.

        >>> InputColumn("text", ("title", "document.body"), separator=": ").name
        '__text'
    """

    role: str
    columns: tuple[str, ...]
    kind: Literal["text", "words"] = "text"
    separator: str = "\n\n"
    prefix: str = ""
    required: bool = True

    def __post_init__(self) -> None:
        if not self.role.isidentifier() or self.role in ("id", "kept", "read_error"):
            raise ValueError(
                f"input role {self.role!r}: give an identifier other than id, kept and read_error"
            )
        if not self.columns or len(set(self.columns)) < len(self.columns):
            raise ValueError(f"input {self.role!r}: give its columns, each once")
        if self.kind == "words" and (len(self.columns) > 1 or self.prefix):
            raise ValueError(f"input {self.role!r}: words are one column and take no prefix")

    @property
    def name(self) -> str:
        """The column inside the pipeline."""
        return f"__{self.role}"

    @property
    def is_plain(self) -> bool:
        """Is it one column of texts, read as it is?"""
        return self.kind == "text" and len(self.columns) == 1 and not self.prefix

    @property
    def type(self) -> pa.DataType:
        return pa.large_string() if self.kind == "text" else pa.large_list(pa.large_string())


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
