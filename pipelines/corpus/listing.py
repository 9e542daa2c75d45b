"""Parquet corpora: list and check every file before work begins.

A corpus is listed once, on the driver. All problems of all files are reported together.

Columns inside the pipeline: `id`, `__text` (large_string), `__read_error` (string, null on a good
row), and the kept columns under their output names.
"""

import dataclasses
import logging
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.implementations.arrow import ArrowFSWrapper

from pipelines.errors import Refused
from pipelines.rows import InputColumn
from pipelines.storage import Location, common_directory, has_wildcard, locate

logger = logging.getLogger(__name__)

ID, TEXT, READ_ERROR = "id", "__text", "__read_error"
_NUM_THREADS = 16
_NUM_NAMED = 5  # how many offending rows or files a message names


@dataclass(frozen=True)
class InputFile:
    """One Parquet file of the corpus. `num_rows` counts the rows used (`--limit` may cut)."""

    path: str
    name: str  # relative to the root of the input; the file half of a generated id
    num_bytes: int
    modified_ns: int
    num_rows: int
    row_groups: tuple[tuple[int, int], ...]  # (first row in the file, rows used)


@dataclass(frozen=True)
class Corpus:
    """A listed and checked corpus, ready to be read anywhere.

    `id_column` None means ids are made: `name#row`. `kept` maps a column to its output name.
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
    def text_column(self) -> str:
        return self.inputs[0].columns[0]

    def column_fingerprint(self) -> dict[str, Any]:
        return {"text": self.text_column, "id": self.id_column or "file#row", "kept": self.kept}

    @property
    def num_rows(self) -> int:
        return sum(f.num_rows for f in self.files)

    @property
    def num_bytes(self) -> int:
        return sum(f.num_bytes for f in self.files)

    @property
    def schema(self) -> pa.Schema:
        """What reading yields."""
        own = [
            pa.field(ID, pa.string()),
            pa.field(TEXT, pa.large_string()),
            pa.field(READ_ERROR, pa.string()),
        ]
        return pa.schema([*own, *self.kept_schema])

    def listing(self) -> dict[str, dict[str, int]]:
        """What of the input can change a row, by file: for the fingerprint of a run."""
        return {
            f.name: {"bytes": f.num_bytes, "rows": f.num_rows, "modified_ns": f.modified_ns}
            for f in self.files
        }


# --- listing and checking ---------------------------------------------------------------------


@dataclass
class _Footer:
    """A file's footer, or why it has none."""

    info: pafs.FileInfo
    name: str
    problem: str | None = None
    schema: pa.Schema | None = None
    row_groups: tuple[tuple[int, int], ...] = ()

    @property
    def columns(self) -> pa.Schema:
        assert self.schema is not None
        return self.schema


def list_corpus(
    paths: Sequence[str],
    *,
    inputs: Sequence[InputColumn],
    id_column: str | None,
    kept: dict[str, str],
    reserved: Iterable[str] = (),
    skip_bad_files: bool = False,
    limit: int | None = None,
) -> Corpus:
    """List the Parquet files of `paths` and check all that can be checked without the text.

    `id_column` None takes a column `id` if every file has one, else makes ids `file#row`.
    `reserved` are output column names that a kept column may not take.
    Raises: Refused with all problems of all files.
    """
    problems: list[str] = []
    text_column = inputs[0].columns[0]
    root, found = _find_files(paths)
    footers = _read_footers(root, found)
    skipped = {f.name: f.problem for f in footers if f.problem}
    if skipped and not skip_bad_files:
        problems += [f"{name}: {why}" for name, why in skipped.items()]
        problems.append(
            "(--skip-bad-files leaves unreadable files out and lists them in the manifest)"
        )
    good = [f for f in footers if not f.problem]
    if not good:
        raise Refused([*problems, "no readable Parquet file is left in the input"])
    id_column = _choose_id_column(good, id_column, problems)
    problems += _check_columns(good, text_column, id_column, kept)
    problems += _check_names(kept, reserved)
    kept_schema = _unify_kept(good, kept, problems)
    corpus = Corpus(
        filesystem=root.filesystem,
        root=root,
        files=tuple(_limited(good, limit)),
        id_column=id_column,
        inputs=tuple(inputs),
        kept=kept,
        kept_schema=kept_schema,
        skipped={name: str(why) for name, why in skipped.items()},
    )
    if not problems and id_column is not None:
        corpus, id_problems = _check_ids(corpus, skip_bad_files)
        problems += id_problems
    if not problems and not corpus.num_rows:
        problems.append("the input holds no rows")
    if problems:
        raise Refused(problems)
    return corpus


def _find_files(paths: Sequence[str]) -> tuple[Location, list[pafs.FileInfo]]:
    problems: list[str] = []
    roots: list[str] = []
    found: dict[str, pafs.FileInfo] = {}
    locations: dict[str, Location] = {}
    for given in paths:
        try:
            locations[given] = locate(given)
        except Refused as error:
            problems += error.problems
    if len({(loc.scheme, loc.filesystem.type_name) for loc in locations.values()}) > 1:
        problems.append("all --input paths must lie on one file system")
    for given, location in locations.items():
        try:
            root, infos = _expand(location)
        except OSError as error:
            problems.append(f"{given}: cannot be listed: {error}")
            continue
        if not infos:
            problems.append(f"{given}: matches no Parquet file")
        roots.append(root)
        found.update({i.path: i for i in infos})
    if problems:
        raise Refused(problems)
    first = next(iter(locations.values()))
    root_path = common_directory(roots)
    return Location(first.filesystem, root_path, first.scheme), [found[p] for p in sorted(found)]


def _expand(location: Location) -> tuple[str, list[pafs.FileInfo]]:
    """The directory a path counts from, and its files."""
    info = location.info()
    if info.type == pafs.FileType.Directory:
        return location.path, _parquet_below(location)
    if info.is_file:  # also one with a wildcard character in its very name
        return posixpath.dirname(location.path), [info]
    if not has_wildcard(location.path):
        raise FileNotFoundError("there is no such file or directory")
    parts = location.path.split("/")
    num_fixed = next(i for i, part in enumerate(parts) if has_wildcard(part))
    # A pattern that spells out a hidden name means it.
    means_hidden = any(map(_hidden, parts[num_fixed:]))
    matches = ArrowFSWrapper(location.filesystem).glob(location.path)
    infos: list[pafs.FileInfo] = []
    for match in matches:
        inner = dataclasses.replace(location, path=str(match))
        if any(map(_hidden, inner.path.split("/")[num_fixed:])) and not means_hidden:
            continue
        info = inner.info()
        if info.type == pafs.FileType.Directory:
            infos += _parquet_below(inner)
        elif info.is_file:
            infos.append(info)
    return "/".join(parts[:num_fixed]), infos


def _hidden(name: str) -> bool:
    return name.startswith(("_", "."))


def _parquet_below(directory: Location) -> list[pafs.FileInfo]:
    def wanted(info: pafs.FileInfo) -> bool:
        inside = info.path[len(directory.path) :].strip("/").split("/")
        return info.path.endswith(".parquet") and not any(map(_hidden, inside))

    return [i for i in directory.files(recursive=True) if wanted(i)]


def _read_footers(root: Location, infos: list[pafs.FileInfo]) -> list[_Footer]:
    def read(info: pafs.FileInfo) -> _Footer:
        footer = _Footer(info, info.path[len(root.path) :].lstrip("/"))
        if info.size == 0:
            footer.problem = "is empty (0 bytes), not a Parquet file"
            return footer
        try:
            with root.filesystem.open_input_file(info.path) as handle:
                metadata = pq.read_metadata(handle)
                footer.schema = metadata.schema.to_arrow_schema()
        except (OSError, pa.ArrowException) as error:
            footer.problem = f"is not a readable Parquet file: {one_line(error)}"
            return footer
        counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        starts = [sum(counts[:g]) for g in range(len(counts))]
        footer.row_groups = tuple(zip(starts, counts, strict=True))
        return footer

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(read, infos))


def _choose_id_column(footers: list[_Footer], asked: str | None, problems: list[str]) -> str | None:
    if asked is not None:
        return asked
    without = [f.name for f in footers if ID not in f.columns.names]
    if not without:
        return ID
    if len(without) < len(footers):
        problems.append(
            f"column {ID!r} is in some files but missing in {_named(without)}: "
            "name another with --id-column, or give every file one"
        )
    return None


def _check_columns(
    footers: list[_Footer], text_column: str, id_column: str | None, kept: dict[str, str]
) -> list[str]:
    problems = []
    for footer in footers:
        names = footer.columns.names
        wanted = [text_column, *([id_column] if id_column else []), *kept]
        twice = [c for c in dict.fromkeys(wanted) if names.count(c) > 1]
        if twice:
            problems.append(f"{footer.name}: more than one column is called {_named(twice)}")
            continue
        missing = [c for c in dict.fromkeys(wanted) if c not in names]
        if missing:
            problems.append(
                f"{footer.name}: no column {_named(missing)}; it has {_named(names, 12)}"
            )
        if text_column in names and not is_text(footer.columns.field(text_column).type):
            kind = footer.columns.field(text_column).type
            problems.append(f"{footer.name}: text column {text_column!r} is {kind}, not a string")
        if id_column in names:
            kind = footer.columns.field(id_column).type
            if not (is_text(kind) or pa.types.is_integer(kind)):
                problems.append(
                    f"{footer.name}: id column {id_column!r} is {kind}; ids are strings or integers"
                )
    return problems


def _check_names(kept: dict[str, str], reserved: Iterable[str]) -> list[str]:
    taken = set(reserved)
    problems = [
        f"kept column {old!r} would overwrite the output column {new!r}: "
        f"rename it with --keep-as {old}=other_name"
        for old, new in kept.items()
        if new in taken or new.startswith("__")
    ]
    twice = {new for new in kept.values() if list(kept.values()).count(new) > 1}
    return problems + [f"two kept columns would both be called {name!r}" for name in sorted(twice)]


def is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_string(value)
        or pa.types.is_large_string(value)
        or pa.types.is_string_view(value)
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    """Strings of every encoding are one type to a reader."""
    return pa.large_string() if is_text(kind) else kind


def _unify_kept(footers: list[_Footer], kept: dict[str, str], problems: list[str]) -> pa.Schema:
    fields = []
    for old, new in kept.items():
        holders = [f for f in footers if f.columns.names.count(old) == 1]
        if not holders:
            continue
        try:
            unified = pa.unify_schemas(
                [pa.schema([pa.field(new, _plain(f.columns.field(old).type))]) for f in holders],
                promote_options="permissive",
            )
        except pa.ArrowException:
            kinds = {str(f.columns.field(old).type): f.name for f in holders}
            listed = ", ".join(f"{kind} in {name}" for kind, name in kinds.items())
            problems.append(f"kept column {old!r} has no common type: {listed}")
            continue
        fields.append(unified.field(0).with_nullable(True))
    return pa.schema(fields)


def _limited(footers: list[_Footer], limit: int | None) -> Iterator[InputFile]:
    """Files in order of their relative path, cut after `limit` rows."""
    left = limit
    for footer in sorted(footers, key=lambda f: f.name):
        groups = []
        for start, count in footer.row_groups:
            used = count if left is None else min(count, left)
            groups.append((start, used))
            left = None if left is None else left - used
        info = footer.info
        yield InputFile(
            path=info.path,
            name=footer.name,
            num_bytes=info.size,
            modified_ns=info.mtime_ns or 0,
            num_rows=sum(used for _, used in groups),
            row_groups=tuple(groups),
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
        if ids.null_count:
            rows = pc.indices_nonzero(ids.is_null())[:_NUM_NAMED].to_pylist()
            problems.append(f"{file.name}: {ids.null_count} null ids, first in rows {rows}")
    problems += _duplicates(columns)
    return dataclasses.replace(corpus, files=tuple(good), skipped=skipped), problems


def _duplicates(columns: list[pa.Array]) -> list[str]:
    ids = pa.chunked_array(columns, pa.string()).drop_null()
    if len(ids) == pc.count_distinct(ids).as_py():
        return []
    counts = pc.value_counts(ids)
    values, numbers = counts.field("values"), counts.field("counts")
    repeated = pc.filter(values, pc.greater(numbers, 1))
    return [
        f"{len(repeated)} ids stand for more than one row, for example "
        f"{_named([str(v) for v in repeated[:_NUM_NAMED].to_pylist()])}: ids must be unique"
    ]


def read_ids(corpus: Corpus, file: InputFile) -> pa.Array:
    """The ids of one file's used rows, as strings, in row order."""
    if corpus.id_column is None:
        return pa.array([f"{file.name}#{row}" for row in range(file.num_rows)], pa.string())
    with corpus.filesystem.open_input_file(file.path) as handle:
        parquet = pq.ParquetFile(handle, page_checksum_verification=True)
        table = parquet.read(columns=[corpus.id_column], use_threads=False)
    column = as_string(table.column(0).slice(0, file.num_rows))
    # The cast from binary is the one that looks for bytes that are not UTF-8.
    return column.cast(pa.binary()).cast(pa.string()).combine_chunks()


def as_string(column: pa.ChunkedArray, kind: pa.DataType | None = None) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(kind or pa.string())


def attempt(call: Callable[[], pa.Array]) -> pa.Array | Exception:
    try:
        return call()
    except (OSError, pa.ArrowException) as error:
        return error


def _named(names: Sequence[str], most: int = _NUM_NAMED) -> str:
    listed = ", ".join(map(repr, names[:most]))
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
