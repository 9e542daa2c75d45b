"""Parquet files: the footer says what is in them, and they are cut at row groups.

Small row groups are read by one task together. Timestamps in INT96 (Spark, Impala) are read in
microseconds, which hold the year 9999; nanoseconds, Arrow's default, end in 2262.
"""

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus import formats
from pipelines.corpus.columns import is_text, select, type_of
from pipelines.corpus.formats import Inspected, Piece, Source
from pipelines.corpus.problems import attempt, one_line

logger = logging.getLogger(__name__)

_REREAD_AFTER_S = (0.2, 1.0)


class Parquet:
    """A piece is a run of row groups: their numbers from `start` to before `stop`."""

    name = "Parquet"

    def inspect(self, source: Source, wanted: Sequence[str]) -> Inspected:
        with source.open() as handle:
            file = _open(handle)
            schema = file.schema_arrow
            leaves = _leaves(file.metadata, wanted)
            groups = range(file.metadata.num_row_groups)
            sizes = [_size(file.metadata, group, leaves) for group in groups]
            return Inspected(schema, tuple(_pieces(sizes)), _all_null(file, wanted))

    def rows(
        self, source: Source, piece: Piece, wanted: Sequence[str], schema: pa.Schema
    ) -> Iterator[tuple[pa.Table, str | None]]:
        """Yield the rows of the piece's row groups.

        A page that cannot be decoded makes nulls of its slice and the rest of the row group, in
        its column alone.
        """
        del schema
        group, done = piece.start, 0
        while group < piece.stop:
            try:
                with source.open() as handle:
                    file = _open(handle)
                    leaves = _leaves(file.metadata, wanted)
                    while group < piece.stop:
                        for rows in _slices(file, group, wanted, leaves):
                            yield rows, None
                            done += rows.num_rows
                        group, done = group + 1, 0
                return
            except (OSError, pa.ArrowException) as error:
                said = "%s, row group %d: %s; reading column by column"
                logger.warning(said, source.path, group, error)
            rows, reason = _read_what_can_be_read(source, group, wanted)
            yield rows.slice(done), reason and f"row group {group}: {reason}"
            group, done = group + 1, 0


def _open(handle: pa.NativeFile) -> pq.ParquetFile:
    return pq.ParquetFile(handle, page_checksum_verification=True, coerce_int96_timestamp_unit="us")


def _leaves(metadata: pq.FileMetaData, wanted: Sequence[str]) -> list[int]:
    """The numbers of the column chunks that hold the wanted columns."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    return [i for i, p in enumerate(paths) if any(p == w or p.startswith(f"{w}.") for w in wanted)]


def _size(metadata: pq.FileMetaData, group: int, leaves: list[int]) -> tuple[int, int]:
    """The rows of a row group, and the bytes of these column chunks without compression."""
    found = metadata.row_group(group)
    return found.num_rows, sum(found.column(i).total_uncompressed_size for i in leaves)


def _pieces(sizes: list[tuple[int, int]]) -> Iterator[Piece]:
    first_row = start = num_rows = num_bytes = 0
    for number, (rows, size) in enumerate(sizes):
        if num_rows and num_bytes + size > formats.PIECE_BYTES:
            yield Piece(first_row, num_rows, start, number)
            first_row, start, num_rows, num_bytes = first_row + num_rows, number, 0, 0
        num_rows += rows
        num_bytes += size
    if num_rows:
        yield Piece(first_row, num_rows, start, len(sizes))


def _all_null(file: pq.ParquetFile, wanted: Sequence[str]) -> frozenset[str]:
    """Wanted columns of no use as text that hold only nulls: pandas stores such a one as double."""
    metadata, found = file.metadata, set()
    for path in wanted:
        kind = type_of(file.schema_arrow, path)
        if kind is None or is_text(kind):
            continue
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        leaves = _leaves(metadata, [path])
        chunks = [(group.num_rows, group.column(i).statistics) for group in groups for i in leaves]
        if all(s is not None and s.has_null_count and s.null_count == n for n, s in chunks):
            found.add(path)
    return frozenset(found)


def _slices(
    file: pq.ParquetFile, group: int, wanted: Sequence[str], leaves: list[int]
) -> Iterator[pa.Table]:
    num_rows, num_bytes = _size(file.metadata, group, leaves)
    fitting = formats.SLICE_BYTES * num_rows // max(num_bytes, 1)
    batches = file.iter_batches(
        min(formats.SLICE_ROWS, max(fitting, 1)),
        row_groups=[group],
        columns=list(wanted),
        use_threads=False,
    )
    for batch in batches:
        yield select(pa.Table.from_batches([batch]), wanted)


def _read_what_can_be_read(
    source: Source, group: int, wanted: Sequence[str]
) -> tuple[pa.Table, str | None]:
    """Every column that decodes, the others null, and why one did not, if any did not."""
    columns: dict[str, Any] = {}
    reason = None
    for path in wanted:
        column = _read_patiently(source, group, path)
        if isinstance(column, Exception):
            reason = one_line(column)
            column = None
        columns[path] = column
    with source.open() as handle:
        file = _open(handle)
        num_rows = file.metadata.row_group(group).num_rows
        for path, column in columns.items():
            if column is None:
                columns[path] = pa.nulls(num_rows, type_of(file.schema_arrow, path))
    return pa.table(columns), reason


def _read_patiently(source: Source, group: int, path: str) -> pa.ChunkedArray | Exception:
    """A store that is unwell for a moment is no bad page: three readings before giving up."""
    column: pa.ChunkedArray | Exception = None
    for wait_s in (0.0, *_REREAD_AFTER_S):
        time.sleep(wait_s)
        column = attempt(functools.partial(_read_column, source, group, path))
        if not isinstance(column, Exception):
            break
    return column


def _read_column(source: Source, group: int, path: str) -> pa.ChunkedArray:
    with source.open() as handle:
        table = _open(handle).read_row_group(group, columns=[path], use_threads=False)
        return select(table, [path]).column(0)
