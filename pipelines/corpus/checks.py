"""Checks of the columns and names of listed files. Every check returns all it finds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from pipelines.corpus.columns import find, is_id, is_text, is_words, plain, type_of
from pipelines.corpus.formats import Format, Inspected
from pipelines.corpus.problems import NUM_NAMED, named
from pipelines.rows import InputColumn

MAKE_IDS = "--id-column file#row makes ids out of file and row instead"
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # null in the name of a folder


@dataclass(frozen=True)
class Candidate:
    """A file as it was found."""

    info: pafs.FileInfo
    name: str
    format: Format
    inspected: Inspected

    @property
    def schema(self) -> pa.Schema:
        return self.inspected.schema

    def has(self, path: str) -> bool:
        return find(self.schema, path) is not None

    @property
    def folders(self) -> dict[str, str | None]:
        """The columns that the path spells out: `year=2024/part-0.parquet`."""
        pairs = [part.partition("=") for part in self.name.split("/")[:-1] if "=" in part]
        return {
            unquote(key): None if value == _NO_VALUE else unquote(value) for key, _, value in pairs
        }


def choose_id_column(files: list[Candidate], name: str, problems: list[str]) -> str | None:
    """`name` if every file has such a column, None if none has."""
    without = [f.name for f in files if not f.has(name)]
    if not without:
        return name
    if len(without) < len(files):
        problems.append(
            f"column {name!r} is in some files but missing in {named(without)}: "
            f"name another with --id-column, or give every file one; {MAKE_IDS}"
        )
    return None


def check_columns(
    files: list[Candidate],
    inputs: Sequence[InputColumn],
    id_column: str | None,
    kept: dict[str, str],
) -> list[str]:
    problems = []
    for file in files:
        heads = file.schema.names
        read = [c for given in inputs for c in given.columns]
        wanted = list(dict.fromkeys([*read, *([id_column] if id_column else []), *kept]))
        named_by = [c if c in heads else c.partition(".")[0] for c in wanted]
        twice = [name for name in dict.fromkeys(named_by) if heads.count(name) > 1]
        if twice:
            problems.append(f"{file.name}: more than one column is called {named(twice)}")
            continue
        optional = {c for given in inputs if not given.required for c in given.columns}
        missing = [
            c
            for c in wanted
            if not file.has(c) and c not in optional and not (c in kept and c in file.folders)
        ]
        if missing:
            folders = f", and folders give {named(list(file.folders))}" if file.folders else ""
            problems.append(
                f"{file.name}: no column {named(missing)}; it has {named(heads, 12)}{folders}"
            )
        problems += [p for given in inputs for p in _check_input(file, given)]
        kind = type_of(file.schema, id_column) if id_column else None
        if kind is not None and not is_id(kind):
            problems.append(
                f"{file.name}: id column {id_column!r} is {kind}; ids are strings, integers, whole "
                f"decimals or UUIDs; {MAKE_IDS}"
            )
    return problems


def _check_input(file: Candidate, given: InputColumn) -> list[str]:
    problems = []
    for column in given.columns:
        kind = type_of(file.schema, column)
        nothing = kind is None or pa.types.is_null(kind) or column in file.inspected.all_null
        if given.kind == "text" and not nothing and not is_text(kind):
            problems.append(f"{file.name}: {given.role} column {column!r} is {kind}, not a string")
        if given.kind == "words" and not nothing and not is_words(kind):
            problems.append(
                f"{file.name}: {given.role} column {column!r} is {kind}, not a list of strings"
            )
    return problems


def check_names(kept: dict[str, str], reserved: Iterable[str]) -> list[str]:
    taken = set(reserved)
    problems = [
        f"kept column {old!r} would overwrite the output column {new!r}: "
        f"rename it with --keep-as {old}=other_name"
        for old, new in kept.items()
        if new in taken or new.startswith("__")
    ]
    twice = {new for new in kept.values() if list(kept.values()).count(new) > 1}
    return problems + [f"two kept columns would both be called {name!r}" for name in sorted(twice)]


def unify_kept(files: list[Candidate], kept: dict[str, str], problems: list[str]) -> pa.Schema:
    """The kept columns under their output names, in a type that holds the values of all files."""
    fields = []
    for old, new in kept.items():
        kinds: dict[str, pa.DataType] = {}
        # A column of nulls has whatever type its writer fancied.
        with_values = [f for f in files if old not in f.inspected.all_null]
        for file in with_values or files:
            kind = type_of(file.schema, old)
            if kind is None and old in file.folders:
                kind = pa.large_string()
            if kind is not None:
                kinds[file.name] = plain(kind)
        if not kinds:
            continue
        try:
            unified = pa.unify_schemas(
                [pa.schema([pa.field(new, kind)]) for kind in dict.fromkeys(kinds.values())],
                promote_options="permissive",
            )
        except pa.ArrowException:
            examples = {str(kind): name for name, kind in kinds.items()}
            listed = ", ".join(f"{kind} in {name}" for kind, name in examples.items())
            problems.append(f"kept column {old!r} has no common type: {listed}")
            continue
        fields.append(unified.field(0).with_nullable(True))
    return pa.schema(fields)


def null_ids(file: str, ids: pa.Array) -> list[str]:
    if not ids.null_count:
        return []
    rows = pc.indices_nonzero(ids.is_null())[:NUM_NAMED].to_pylist()
    return [f"{file}: {ids.null_count} null ids, first in rows {rows}; {MAKE_IDS}"]


def duplicate_ids(columns: list[pa.Array]) -> list[str]:
    ids = pa.chunked_array(columns, pa.string()).drop_null()
    if len(ids) == pc.count_distinct(ids).as_py():
        return []
    counts = pc.value_counts(ids)
    values, numbers = counts.field("values"), counts.field("counts")
    repeated = pc.filter(values, pc.greater(numbers, 1))
    return [
        f"{len(repeated)} ids stand for more than one row, for example "
        f"{named([str(v) for v in repeated[:NUM_NAMED].to_pylist()])}: ids must be unique; "
        f"{MAKE_IDS}"
    ]
