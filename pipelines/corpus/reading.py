"""Reading a listed corpus by row group, as a Ray `Datasource` of our own.

One task per row group, streamed in slices, that yields the final `id`: Ray's checkpoint filters
right after the read, so an id made later would break every resume.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from pipelines.corpus.listing import Corpus, InputFile, as_string, attempt, is_text, one_line
from pipelines.errors import RunFailed

logger = logging.getLogger(__name__)

SLICE_ROWS = 256
_REREAD_AFTER_S = (0.2, 1.0)


def sample(corpus: Corpus, num_rows: int = 256) -> Iterator[pa.Table]:
    """Yield some rows of a corpus, from the beginnings of files all over it."""
    files = [file for file in corpus.files if file.num_rows]
    step = max(1, len(files) // 16)
    chosen = files[::step]
    for file in chosen:
        index = next(i for i, (_, count) in enumerate(file.row_groups) if count)
        rows = next(iter(read_row_group(corpus, file, index)))
        yield rows.slice(0, max(1, num_rows // len(chosen)))


class ParquetCorpus(Datasource):  # type: ignore[misc]
    """Reads a `Corpus`: one task per row group, rows in slices of `SLICE_ROWS`."""

    def __init__(self, corpus: Corpus) -> None:
        super().__init__()
        self.corpus = corpus

    def get_name(self) -> str:
        return "Parquet"

    def estimate_inmemory_data_size(self) -> int | None:
        return self.corpus.num_bytes * 3

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task per row group; Ray's wish for another number is noted and not followed."""
        del parallelism, data_context
        return [
            ReadTask(
                _Reader(self.corpus, file, index),
                BlockMetadata(
                    num_rows=num_rows, size_bytes=None, input_files=(file.path,), exec_stats=None
                ),
                schema=self.corpus.schema,
                per_task_row_limit=per_task_row_limit,
            )
            for file in self.corpus.files
            for index, (_, num_rows) in enumerate(file.row_groups)
            if num_rows
        ]


class _Reader:
    """The work of one read task."""

    def __init__(self, corpus: Corpus, file: InputFile, index: int) -> None:
        # A task carries its own file only: thousands of tasks must not each carry the listing.
        self.corpus = dataclasses.replace(corpus, files=(), skipped={})
        self.file, self.index = file, index

    def __call__(self) -> Iterator[pa.Table]:
        return read_row_group(self.corpus, self.file, self.index)


def read_row_group(corpus: Corpus, file: InputFile, index: int) -> Iterator[pa.Table]:
    """The rows of one row group in slices.

    A page that cannot be decoded makes error rows of its slice and the rest of the row group:
    their ids are known, so they are accounted for like any other failed row.
    Raises: RunFailed if the file is no longer the one that was listed.
    """
    _check_unchanged(corpus, file)
    first, num_rows = file.row_groups[index]
    wanted = [corpus.text_column, *corpus.kept, *([corpus.id_column] if corpus.id_column else [])]
    wanted = list(dict.fromkeys(wanted))
    done = 0
    try:
        for rows in _slices(corpus, file, index, wanted):
            part = rows.slice(0, num_rows - done)
            if part.num_rows:
                yield _normalise(corpus, file, part, first + done)
                done += part.num_rows
        return
    except (OSError, pa.ArrowException) as error:
        logger.warning("%s, row group %d: %s; reading column by column", file.name, index, error)
    rows, reason = _read_what_can_be_read(corpus, file, index, wanted)
    if reason is not None:
        reason = f"{file.name}, row group {index}: {reason}"
    yield _normalise(corpus, file, rows.slice(done, num_rows - done), first + done, reason)


def _slices(corpus: Corpus, file: InputFile, index: int, wanted: list[str]) -> Iterator[pa.Table]:
    with corpus.filesystem.open_input_file(file.path) as handle:
        parquet = pq.ParquetFile(handle, page_checksum_verification=True)
        for batch in parquet.iter_batches(
            SLICE_ROWS, row_groups=[index], columns=wanted, use_threads=False
        ):
            yield pa.Table.from_batches([batch])


def _check_unchanged(corpus: Corpus, file: InputFile) -> None:
    info = corpus.filesystem.get_file_info(file.path)
    # Of one object a listing may know milliseconds and a look at it alone whole seconds.
    unit = 1 if corpus.root.is_local else 10**9
    modified = (info.mtime_ns or 0) // unit == file.modified_ns // unit
    if info.size != file.num_bytes or not modified:
        raise RunFailed(
            f"{file.name} was changed or removed since it was listed; put it back, or start again "
            "with another --output"
        )


def _read_what_can_be_read(
    corpus: Corpus, file: InputFile, index: int, wanted: list[str]
) -> tuple[pa.Table, str | None]:
    """Every column that decodes, the others null, and why one did not, if any did not."""
    columns: dict[str, Any] = {}
    reason = None
    for name in wanted:
        column = _read_patiently(corpus, file, index, name)
        if isinstance(column, Exception):
            reason = one_line(column)
            column = None
        columns[name] = column
    with corpus.filesystem.open_input_file(file.path) as handle:
        parquet = pq.ParquetFile(handle)
        num_rows = parquet.metadata.row_group(index).num_rows
        for name, column in columns.items():
            if column is None:
                columns[name] = pa.nulls(num_rows, parquet.schema_arrow.field(name).type)
    return pa.table(columns), reason


def _read_patiently(
    corpus: Corpus, file: InputFile, index: int, name: str
) -> pa.ChunkedArray | Exception:
    """A store that is unwell for a moment is no bad page: three readings before giving up."""
    column: pa.ChunkedArray | Exception = None
    for wait_s in (0.0, *_REREAD_AFTER_S):
        time.sleep(wait_s)
        column = attempt(functools.partial(_read_column, corpus, file, index, name))
        if not isinstance(column, Exception):
            break
    return column


def _read_column(corpus: Corpus, file: InputFile, index: int, name: str) -> pa.ChunkedArray:
    with corpus.filesystem.open_input_file(file.path) as handle:
        parquet = pq.ParquetFile(handle, page_checksum_verification=True)
        return parquet.read_row_group(index, columns=[name], use_threads=False).column(0)


def _normalise(
    corpus: Corpus, file: InputFile, rows: pa.Table, first_row: int, read_error: str | None = None
) -> pa.Table:
    count = rows.num_rows
    if corpus.id_column is None:
        ids = pa.array([f"{file.name}#{first_row + i}" for i in range(count)], pa.string())
    else:
        ids = as_string(rows.column(corpus.id_column))
    if ids.null_count:
        raise RunFailed(f"{file.name}: its ids could be read when it was listed and cannot be now")
    text = as_string(rows.column(corpus.text_column), pa.large_string())
    columns = [ids, text, pa.array([read_error] * count, pa.string())]
    for (old, _), target in zip(corpus.kept.items(), corpus.kept_schema, strict=True):
        column = rows.column(old)
        plain = as_string(column, pa.large_string()) if is_text(column.type) else column
        try:
            columns.append(plain.cast(target.type))
        except pa.ArrowInvalid as error:
            raise RunFailed(
                f"{file.name}: kept column {old!r} is {column.type} here and {target.type} in the "
                f"output, which cannot hold it: {one_line(error)}"
            ) from error
    return pa.table(columns, schema=corpus.schema)
