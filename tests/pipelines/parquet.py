"""Parquet files for tests: written in row groups, damaged where it hurts, listed and read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.listing import Corpus, list_corpus
from pipelines.corpus.reading import read_piece
from pipelines.errors import Refused
from pipelines.rows import InputColumn

RESERVED = ("id", "summary", "error")


def write(
    path: Path, columns: dict[str, Any] | pa.Table, *, groups: Any = None, **options: Any
) -> Path:
    """Write a table; `groups` lists the rows of each row group (default: one with all rows)."""
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = 0
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        for count in groups if groups is not None else [table.num_rows]:
            # Without a limit of its own the writer would write no empty row group.
            writer.write_table(table.slice(start, count), row_group_size=max(count, 1))
            start += count
    assert start == table.num_rows
    return path


def _chunk(path: Path, column: str, group: int) -> tuple[int, int]:
    """Where the pages of a column chunk lie: first byte and one past the last."""
    row_group = pq.read_metadata(path).row_group(group)
    chunks = [row_group.column(i) for i in range(row_group.num_columns)]
    chunk = next(c for c in chunks if c.path_in_schema == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    return start, start + chunk.total_compressed_size


def destroy_page(path: Path, column: str, group: int = 0) -> None:
    """Overwrite the second half of a column chunk: its last page decodes no more."""
    start, end = _chunk(path, column, group)
    data = bytearray(path.read_bytes())
    middle = (start + end) // 2
    data[middle:end] = b"\xff" * (end - middle)
    path.write_bytes(data)


def flip_bit(path: Path, column: str, group: int = 0) -> None:
    """Change one bit near the end of a column chunk: it decodes, and only a checksum can tell."""
    _, end = _chunk(path, column, group)
    data = bytearray(path.read_bytes())
    data[end - 3] ^= 1
    path.write_bytes(data)


def invalid_utf8(texts: list[bytes | None]) -> pa.Array:
    """A string array of these very bytes, whatever they are."""
    binary = pa.array(texts, pa.large_binary())
    return pa.Array.from_buffers(
        pa.large_string(), len(binary), binary.buffers(), null_count=binary.null_count
    )


def listed(paths: str | Path | Sequence[str | Path], **options: Any) -> Corpus:
    several = [paths] if isinstance(paths, str | Path) else paths
    inputs = [InputColumn("text", ("text",))]
    settings: dict[str, Any] = {"inputs": inputs, "reserved": RESERVED}
    return list_corpus([str(p) for p in several], **settings | options)


def read(corpus: Corpus) -> pa.Table:
    tables = [
        table
        for file in corpus.files
        for piece in file.pieces
        for table in read_piece(corpus, file, piece)
    ]
    assert all(table.schema == corpus.schema for table in tables)
    return pa.concat_tables(tables)


def texts(n: int, start: int = 0) -> dict[str, list[str]]:
    return {"text": [f"text {i}" for i in range(start, start + n)]}


def problems_of(paths: Any, **options: Any) -> str:
    with pytest.raises(Refused) as refused:
        listed(paths, **options)
    assert refused.value.exit_code == 2
    return "\n".join(refused.value.problems)
