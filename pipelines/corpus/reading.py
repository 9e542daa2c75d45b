"""Reading of a listed corpus as a Ray `Datasource` of our own.

One task per piece of a file, streamed in slices, that yields the final `id`: Ray's checkpoint
filters right after the read, so an id made later would break every resume.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from pipelines.corpus.columns import as_ids, as_string, combine, find, is_text, without_bad_utf8
from pipelines.corpus.formats import Piece, Source
from pipelines.corpus.listing import Corpus, InputFile
from pipelines.corpus.problems import one_line
from pipelines.errors import RunFailed


class CorpusDatasource(Datasource):  # type: ignore[misc]
    """Reads a `Corpus`: one task per piece, rows in slices."""

    def __init__(self, corpus: Corpus) -> None:
        super().__init__()
        self.corpus = corpus

    def get_name(self) -> str:
        return "Corpus"

    def estimate_inmemory_data_size(self) -> int | None:
        return self.corpus.num_bytes * 3

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task per piece; Ray's wish for another number is noted and not followed."""
        del parallelism, data_context
        return [
            ReadTask(
                _Reader(self.corpus, file, piece),
                BlockMetadata(
                    num_rows=piece.num_rows,
                    size_bytes=None,
                    input_files=(file.path,),
                    exec_stats=None,
                ),
                schema=self.corpus.schema,
                per_task_row_limit=per_task_row_limit,
            )
            for file in self.corpus.files
            for piece in file.pieces
        ]


class _Reader:
    """The work of one read task."""

    def __init__(self, corpus: Corpus, file: InputFile, piece: Piece) -> None:
        # A task carries its own piece only: thousands of tasks must not each carry the listing.
        self.corpus = dataclasses.replace(corpus, files=(), skipped={})
        self.file, self.piece = dataclasses.replace(file, pieces=()), piece

    def __call__(self) -> Iterator[pa.Table]:
        return read_piece(self.corpus, self.file, self.piece)


def read_piece(corpus: Corpus, file: InputFile, piece: Piece) -> Iterator[pa.Table]:
    """The rows of one piece in slices.

    What cannot be decoded makes error rows: their ids are known, so they are accounted for like
    any other failed row.
    Raises: RunFailed if the file is no longer the one that was listed.
    """
    _check_unchanged(corpus, file)
    source = Source(corpus.filesystem, file.path)
    wanted = [c for c in corpus.source_columns if find(file.schema, c)]
    done = 0
    for rows, reason in file.format.rows(source, piece, wanted, file.schema):
        part = rows.slice(0, piece.num_rows - done)
        if part.num_rows:
            told = None if reason is None else f"{file.name}, {reason}"
            yield _normalise(corpus, file, part, piece.first_row + done, told)
            done += part.num_rows
        if done == piece.num_rows:
            return
    raise RunFailed(f"{file.name}: {piece.num_rows - done} rows fewer than when it was listed")


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


def _normalise(
    corpus: Corpus, file: InputFile, rows: pa.Table, first_row: int, read_error: str | None
) -> pa.Table:
    count = rows.num_rows
    if corpus.id_column is None:
        ids = pa.array([f"{file.name}#{first_row + i}" for i in range(count)], pa.string())
    else:
        ids = as_ids(rows.column(corpus.id_column))
    if ids.null_count:
        raise RunFailed(f"{file.name}: its ids could be read when it was listed and cannot be now")
    errors = [read_error] * count
    kept = []
    for old, target in zip(corpus.kept, corpus.kept_schema, strict=True):
        column, bad = without_bad_utf8(_kept(file, rows, old, target.type))
        kept.append(column)
        for row in bad:
            errors[row] = f"kept column {old!r} is not valid UTF-8"
    inputs = [combine(given, rows) for given in corpus.inputs]
    columns = [ids, *inputs, pa.array(errors, pa.string()), *kept]
    return pa.table(columns, schema=corpus.schema)


def _kept(file: InputFile, rows: pa.Table, name: str, target: pa.DataType) -> pa.ChunkedArray:
    if name in file.folders:
        value = pa.scalar(file.folders[name], pa.large_string())
        return pa.chunked_array([pa.repeat(value, rows.num_rows)]).cast(target)
    column = rows.column(name)
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), target)])
    column = as_string(column, pa.large_string()) if is_text(column.type) else column
    try:
        return column.cast(target)
    except pa.ArrowInvalid as error:
        raise RunFailed(
            f"{file.name}: kept column {name!r} is {column.type} here and {target} in the output, "
            f"which cannot hold it: {one_line(error)}"
        ) from error
