"""Columns of the input: found by name or dotted path, and turned into ids, texts and words."""

import uuid
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.rows import InputColumn

# --- where a column is ------------------------------------------------------------------------


def find(fields: pa.Schema | pa.StructType, path: str) -> tuple[str, ...] | None:
    """The names that lead to a column: itself, or the struct and the field in it."""
    names = [field.name for field in fields]
    if path in names:
        return (path,)
    for head in names:
        if path.startswith(f"{head}.") and names.count(head) == 1:
            inner = fields.field(head).type
            rest = path[len(head) + 1 :]
            if pa.types.is_struct(inner) and (inside := find(inner, rest)):
                return (head, *inside)
    return None


def type_of(schema: pa.Schema, path: str) -> pa.DataType | None:
    """The type of a column; None if there is none."""
    names = find(schema, path)
    if names is None:
        return None
    fields = schema
    for name in names:  # the first of its name: one that is there twice is refused
        fields = next(field.type for field in fields if field.name == name)
    return fields


def prune(fields: pa.Schema | pa.StructType, paths: Iterable[str]) -> pa.Schema:
    """What of a schema leads to these columns."""
    paths = list(paths)
    kept = []
    for field in fields:
        inside = [p[len(field.name) + 1 :] for p in paths if p.startswith(f"{field.name}.")]
        if field.name in paths:
            kept.append(field)
        elif inside and pa.types.is_struct(field.type) and (inner := prune(field.type, inside)):
            kept.append(field.with_type(pa.struct(list(inner))))
    return pa.schema(kept)


def select(table: pa.Table, paths: Sequence[str]) -> pa.Table:
    """A table of these columns under their paths as names."""
    columns = {}
    for path in paths:
        head, *inside = find(table.schema, path) or ()
        column = table.column(head)
        columns[path] = pc.struct_field(column, inside) if inside else column
    return pa.table(columns)


# --- which types serve ------------------------------------------------------------------------


def is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_string(value)
        or pa.types.is_large_string(value)
        or pa.types.is_string_view(value)
    )


def is_words(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    is_list = is_list or pa.types.is_fixed_size_list(kind)
    return is_list and (is_text(kind.value_type) or pa.types.is_null(kind.value_type))


def is_id(kind: pa.DataType) -> bool:
    """Strings, integers, decimals without a fraction, and UUIDs."""
    whole = pa.types.is_decimal(kind) and kind.scale == 0
    return is_text(kind) or pa.types.is_integer(kind) or whole or _is_uuid(kind)


def _is_uuid(kind: pa.DataType) -> bool:
    # Files without Arrow's own schema (DuckDB, Postgres) give the 16 bytes alone.
    return isinstance(kind, pa.UuidType) or kind == pa.binary(16)


def plain(kind: pa.DataType) -> pa.DataType:
    """Strings of every encoding are one type to a reader."""
    return pa.large_string() if is_text(kind) else kind


# --- values -----------------------------------------------------------------------------------


def as_string(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(kind)


def as_ids(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids as strings.

    Raises: pa.ArrowInvalid for bytes that are not UTF-8.
    """
    if _is_uuid(column.type):
        if isinstance(column.type, pa.UuidType):
            column = column.cast(pa.binary(16))
        texts = [None if v is None else str(uuid.UUID(bytes=v)) for v in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])
    # The cast from binary is the one that looks for bytes that are not UTF-8.
    return as_string(column, pa.string()).cast(pa.binary()).cast(pa.string())


def combine(given: InputColumn, rows: pa.Table) -> pa.ChunkedArray:
    """The column that a task reads, out of those of `rows` that exist."""
    parts = [rows.column(c) for c in given.columns if c in rows.column_names]
    if not parts:
        return pa.chunked_array([pa.nulls(rows.num_rows, given.type)])
    # A column of another type is one that listing found to hold nothing but nulls.
    serves = is_text if given.kind == "text" else is_words
    texts = [
        as_string(p, given.type)
        if serves(p.type)
        else pa.chunked_array([pa.nulls(len(p), given.type)])
        for p in parts
    ]
    text = texts[0]
    if len(texts) > 1:
        separator = pa.scalar(given.separator, given.type)
        some = pc.is_valid(pc.coalesce(*texts))
        # Arrow leaves a row out of the joined column where all parts are null.
        first = pc.if_else(some, texts[0], "")
        joined = pc.binary_join_element_wise(first, *texts[1:], separator, null_handling="skip")
        text = pc.if_else(some, joined, None)
    if given.prefix:
        before = pa.scalar(given.prefix, given.type)
        whole = pc.binary_join_element_wise(before, text, pa.scalar("", given.type))
        text = pc.if_else(_is_blank(text), text, whole)
    return text


def _is_blank(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        trimmed = pc.utf8_trim_whitespace(texts)
    except pa.ArrowInvalid:  # bytes that are not UTF-8: an error row later on
        trimmed = pc.ascii_trim_whitespace(texts)
    return pc.equal(pc.binary_length(trimmed), 0)


def without_bad_utf8(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[int]]:
    """The column with null where a string is not UTF-8, at any depth, and those rows."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        # Not a slice: that would look at the values of its neighbours' lists too.
        bad = [row for row in range(len(column)) if not _is_valid(column.take([row]))]
        good = pa.array([True] * len(column)).to_numpy(zero_copy_only=False)
        good[bad] = False
        return pc.if_else(pa.array(good), column, None), bad
    return column, []


def _is_valid(column: pa.ChunkedArray) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True
