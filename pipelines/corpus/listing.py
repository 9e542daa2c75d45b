"""Listing of a corpus: every file is found and checked before work begins.

A corpus is listed once, on the driver. All problems of all files are reported together.

Columns inside the pipeline: `id`, a column `__role` for everything that the task reads,
`__read_error` (string, null on a good row), and the kept columns under their output names.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.corpus.checks import (
    Candidate,
    check_columns,
    check_names,
    choose_id_column,
    duplicate_ids,
    null_ids,
    unify_kept,
)
from pipelines.corpus.columns import as_ids, prune
from pipelines.corpus.discovery import PARQUET, find_files, format_of
from pipelines.corpus.formats import Format, Piece, Source, check_beginning
from pipelines.corpus.problems import attempt, one_line
from pipelines.errors import Refused
from pipelines.rows import InputColumn
from pipelines.storage import Location

ID, TEXT, READ_ERROR = "id", "__text", "__read_error"
MADE_ID = "file#row"  # as an id column: ids are made of the file's name and the row's number
_NUM_THREADS = 16


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus. `num_rows` counts the rows used (`--limit` may cut)."""

    path: str
    name: str  # relative to the root of the input; the file half of a generated id
    num_bytes: int
    modified_ns: int
    num_rows: int
    pieces: tuple[Piece, ...]  # what a read task reads, in order
    format: Format
    schema: pa.Schema  # what of the file is read
    folders: dict[str, str | None]  # kept columns that the path gives: year=2024/


@dataclass(frozen=True)
class Corpus:
    """A listed and checked corpus, ready to be read anywhere.

    `id_column` None means ids are made: `name#row`. `kept` maps a column to its output name.
    `list_corpus` makes one; `pipelines.corpus.reading.read_piece` reads its rows.

        >>> corpus = list_corpus(
        ...     ["reports.jsonl"], inputs=[InputColumn("text", ("title", "body"))], id_column="key"
        ... )
        >>> corpus.num_rows, corpus.schema.names
        (2, ['id', '__text', '__read_error'])
    """

    filesystem: pafs.FileSystem
    root: Location
    files: tuple[InputFile, ...]
    id_column: str | None
    inputs: tuple[InputColumn, ...]
    kept: dict[str, str]
    kept_schema: pa.Schema  # output names and types
    skipped: dict[str, str] = field(default_factory=dict)  # bad file -> reason

    @property
    def num_rows(self) -> int:
        return sum(f.num_rows for f in self.files)

    @property
    def num_bytes(self) -> int:
        return sum(f.num_bytes for f in self.files)

    @property
    def num_pieces(self) -> int:
        """How many tasks read it."""
        return sum(len(f.pieces) for f in self.files)

    @property
    def schema(self) -> pa.Schema:
        """What reading yields."""
        own = [
            pa.field(ID, pa.string()),
            *(pa.field(given.name, given.type) for given in self.inputs),
            pa.field(READ_ERROR, pa.string()),
        ]
        return pa.schema([*own, *self.kept_schema])

    @property
    def source_columns(self) -> list[str]:
        """The columns that are read, under the names they have in the files."""
        read = [column for given in self.inputs for column in given.columns]
        return list(
            dict.fromkeys([*read, *self.kept, *([self.id_column] if self.id_column else [])])
        )

    def unjoined(self) -> "Corpus":
        """The same rows with one input for each column, as it stands in the files."""
        columns = {c: given.kind for given in self.inputs for c in given.columns}
        inputs = (
            InputColumn(f"source_{i}", (column,), kind, required=False)
            for i, (column, kind) in enumerate(columns.items())
        )
        return dataclasses.replace(self, inputs=tuple(inputs))

    def listing(self) -> dict[str, dict[str, int]]:
        """What of the input can change a row, by file: for the fingerprint of a run."""
        return {
            f.name: {"bytes": f.num_bytes, "rows": f.num_rows, "modified_ns": f.modified_ns}
            for f in self.files
        }

    def column_fingerprint(self) -> dict[str, Any]:
        """Which columns are read, and how: for the fingerprint of a run.

        A plain column of texts stands there by its name alone.
        """
        roles: dict[str, Any] = {}
        for given in self.inputs:
            whole = {
                "columns": list(given.columns),
                "kind": given.kind,
                "separator": given.separator,
                "prefix": given.prefix,
            }
            roles[given.role] = given.columns[0] if given.is_plain else whole
        return roles | {"id": self.id_column or MADE_ID, "kept": self.kept}


def list_corpus(
    paths: Sequence[str],
    *,
    inputs: Sequence[InputColumn],
    id_column: str | None = None,
    kept: dict[str, str] | None = None,
    reserved: Iterable[str] = (),
    skip_bad_files: bool = False,
    limit: int | None = None,
    output: Location | None = None,
) -> Corpus:
    """List the files of `paths` and check all that can be checked without the texts.

    A path is a file, a glob or a directory, which means its Parquet files at any depth, or its
    JSON Lines or CSV files if it has no other. `id_column` None takes a column `id` if every file
    has one, else makes ids `file#row`; `"file#row"` makes them in any case. `reserved` are output
    column names that a kept column may not take. `output` is where the run will write.

        >>> corpus = list_corpus(["reports.jsonl"], inputs=[InputColumn("text", ("body",))])
        >>> corpus.listing()["reports.jsonl"]["rows"]
        2

    Raises: Refused with all problems of all files.
    """
    kept = kept or {}
    root, found = find_files(paths, output)
    read = [column for given in inputs for column in given.columns]
    candidates, skipped = _inspect(root, found, [*read, id_column or ID, *kept])
    problems: list[str] = []
    if skipped and not skip_bad_files:
        problems += [f"{name}: {why}" for name, why in skipped.items()]
        problems.append(
            "(--skip-bad-files leaves unreadable files out and lists them in the manifest)"
        )
    if not candidates:
        raise Refused([*problems, "no readable file is left in the input"])
    # A file without rows is never read, so its columns do not matter.
    checked = [c for c in candidates if c.inspected.num_rows]
    if id_column is None:
        id_column = choose_id_column(checked, ID, problems)
    elif id_column == MADE_ID:
        id_column = None
    problems += check_columns(checked, inputs, id_column, kept)
    problems += check_names(kept, reserved)
    corpus = Corpus(
        filesystem=root.filesystem,
        root=root,
        files=(),
        id_column=id_column,
        inputs=tuple(inputs),
        kept=kept,
        kept_schema=unify_kept(checked, kept, problems),
        skipped=skipped,
    )
    columns = corpus.source_columns
    corpus = dataclasses.replace(corpus, files=tuple(_limited(candidates, columns, limit)))
    if not problems and id_column is not None:
        corpus, id_problems = _check_ids(corpus, skip_bad_files)
        problems += id_problems
    if not problems and not corpus.num_rows:
        problems.append("the input holds no rows")
    if problems:
        raise Refused(problems)
    return corpus


def _inspect(
    root: Location, infos: list[pafs.FileInfo], wanted: list[str]
) -> tuple[list[Candidate], dict[str, str]]:
    """Every file that can be read, and why the others cannot."""

    def inspect(info: pafs.FileInfo) -> Candidate | str:
        source, kind = Source(root.filesystem, info.path), format_of(info.path) or PARQUET
        if info.size == 0:
            return f"is empty (0 bytes), not a {kind.name} file"

        def look() -> Candidate:
            check_beginning(source)
            name = info.path[len(root.path) :].lstrip("/")
            return Candidate(info, name, kind, kind.inspect(source, wanted))

        found = attempt(look)
        if isinstance(found, Exception):
            return f"is not a readable {kind.name} file: {one_line(found)}"
        return found

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        results = list(pool.map(inspect, infos))
    names = [info.path[len(root.path) :].lstrip("/") for info in infos]
    bad = {n: r for n, r in zip(names, results, strict=True) if isinstance(r, str)}
    return [r for r in results if isinstance(r, Candidate)], bad


def _limited(
    candidates: list[Candidate], columns: Sequence[str], limit: int | None
) -> Iterator[InputFile]:
    """Files in order of their relative path, cut after `limit` rows."""
    left = limit
    for candidate in sorted(candidates, key=lambda c: c.name):
        pieces = []
        for piece in candidate.inspected.pieces:
            used = piece.num_rows if left is None else min(piece.num_rows, left)
            if used:
                pieces.append(dataclasses.replace(piece, num_rows=used))
            left = None if left is None else left - used
        info = candidate.info
        yield InputFile(
            path=info.path,
            name=candidate.name,
            num_bytes=info.size,
            modified_ns=info.mtime_ns or 0,
            num_rows=sum(piece.num_rows for piece in pieces),
            pieces=tuple(pieces),
            format=candidate.format,
            schema=prune(candidate.schema, columns),
            folders={
                name: value
                for name, value in candidate.folders.items()
                if name in columns and not candidate.has(name)
            },
        )


def _check_ids(corpus: Corpus, skip_bad_files: bool) -> tuple[Corpus, list[str]]:
    """Read the id column of every file: unreadable, null and duplicate ids are problems."""
    problems: list[str] = []
    columns, good, skipped = [], [], dict(corpus.skipped)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        results = list(pool.map(lambda f: attempt(lambda: read_ids(corpus, f)), corpus.files))
    for file, ids in zip(corpus.files, results, strict=True):
        if isinstance(ids, Exception):
            reason = f"id column cannot be read: {one_line(ids)}"
            skipped[file.name] = reason
            if not skip_bad_files:
                problems.append(f"{file.name}: {reason}")
            continue
        good.append(file)
        columns.append(ids)
        problems += null_ids(file.name, ids)
    problems += duplicate_ids(columns)
    return dataclasses.replace(corpus, files=tuple(good), skipped=skipped), problems


def read_ids(corpus: Corpus, file: InputFile) -> pa.Array:
    """The ids of one file's used rows, as strings, in row order.

    Raises: OSError or an ArrowException if they cannot be read.
    """
    if corpus.id_column is None:
        return pa.array([f"{file.name}#{row}" for row in range(file.num_rows)], pa.string())
    source, parts = Source(corpus.filesystem, file.path), []
    for piece in file.pieces:
        left = piece.num_rows
        for rows, reason in file.format.rows(source, piece, [corpus.id_column], file.schema):
            if reason is not None:
                raise OSError(reason)
            parts += as_ids(rows.column(0).slice(0, left)).chunks
            if (left := left - rows.num_rows) <= 0:
                break
    return pa.chunked_array(parts, pa.string()).combine_chunks()
