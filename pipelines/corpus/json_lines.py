"""JSON Lines: one object a line, read by Arrow in blocks of whole lines.

No string of JSON holds a raw line break, so a file can be cut at any: a file without compression
is read by several tasks, one with compression by one. Types are inferred over the whole file, of
all its rows; strings that look like times stay strings. Numbers are 64-bit integers or doubles.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

from pipelines.corpus import formats
from pipelines.corpus.columns import prune, select
from pipelines.corpus.formats import Inspected, Piece, Source

_BLOCK_BYTES = 4 * 2**20
_LONGEST_LINE = 2**30  # Arrow counts a block's bytes in 32 bits


class JsonLines:
    """A piece is the lines from byte `start` to before byte `stop` (after decompression)."""

    name = "JSON Lines"

    def inspect(self, source: Source, wanted: Sequence[str]) -> Inspected:
        schema, pieces = pa.schema([]), []
        first_row = num_rows = start = stop = 0
        with source.stream() as stream:
            for block in _blocks(stream, None):
                if not stop and block.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                    raise ValueError("it is one JSON array; write one object a line")
                found, rows = _look(block, wanted, first_row + num_rows)
                schema = _merge(schema, found, wanted)
                num_rows, stop = num_rows + rows, stop + len(block)
                if stop - start >= formats.PIECE_BYTES and not source.is_compressed:
                    pieces.append(Piece(first_row, num_rows, start, stop))
                    first_row, num_rows, start = first_row + num_rows, 0, stop
        pieces.append(Piece(first_row, num_rows, start, stop))
        return Inspected(schema, tuple(p for p in pieces if p.num_rows))

    def rows(
        self, source: Source, piece: Piece, wanted: Sequence[str], schema: pa.Schema
    ) -> Iterator[tuple[pa.Table, str | None]]:
        explicit = prune(schema, wanted)
        with source.stream() if source.is_compressed else source.open() as stream:
            if piece.start:
                stream.seek(piece.start)
            for block in _blocks(stream, piece.stop - piece.start):
                table = select(_parse(block, explicit), wanted)
                for start in range(0, table.num_rows, formats.SLICE_ROWS):
                    yield table.slice(start, formats.SLICE_ROWS), None


def _blocks(stream: pa.NativeFile, num_bytes: int | None) -> Iterator[bytes]:
    """Whole lines of a stream, about `_BLOCK_BYTES` at a time; a longer line comes whole."""
    left = num_bytes
    parts: list[bytes] = []
    while chunk := stream.read(_BLOCK_BYTES if left is None else min(_BLOCK_BYTES, left)):
        left = None if left is None else left - len(chunk)
        end = chunk.rfind(b"\n") + 1
        if end:
            yield b"".join([*parts, chunk[:end]])
            parts = []
        parts.append(chunk[end:])
        if sum(map(len, parts)) > _LONGEST_LINE:
            raise ValueError(f"it has a line of more than {_LONGEST_LINE:,} bytes")
    if any(parts):
        yield b"".join(parts)


def _parse(block: bytes, explicit: pa.Schema | None = None) -> pa.Table:
    behavior = "infer" if explicit is None else "ignore"
    return pj.read_json(
        io.BytesIO(block),
        read_options=pj.ReadOptions(use_threads=False, block_size=len(block) + 1),
        parse_options=pj.ParseOptions(explicit, unexpected_field_behavior=behavior),
    )


def _look(block: bytes, wanted: Sequence[str], first_row: int) -> tuple[pa.Schema, int]:
    """The columns and the number of rows of a block.

    Raises: pa.ArrowInvalid, naming the row in the file.
    """
    try:
        try:
            table = _parse(block)
        except pa.ArrowInvalid as error:
            # A column of several types ends the inference, also one that nobody wants.
            if "changed from" not in str(error) or "Column()" in str(error):
                raise
            schema = _infer(block, wanted)
            return schema, _parse(block, schema).num_rows
    except pa.ArrowInvalid as error:

        def counted(match: re.Match[str]) -> str:
            return f"in row {first_row + int(match[1])}"

        told = re.sub(r"in row (\d+)$", counted, str(error))
        raise pa.ArrowInvalid(told) from error
    return pa.schema([f.with_type(_without_times(f.type)) for f in table.schema]), table.num_rows


def _without_times(kind: pa.DataType) -> pa.DataType:
    """Arrow takes strings that look like times for times; JSON has none."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_without_times(f.type)) for f in kind])
    return kind


def _infer(block: bytes, wanted: Sequence[str]) -> pa.Schema:
    """The types of the wanted columns alone, by Python's parser."""
    lines = block.decode("utf-8-sig", errors="replace").split("\n")
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError:
        raise pa.ArrowInvalid("some column is of several types, and some line is no JSON") from None
    schemas = [pa.schema([])]
    for path in wanted:
        for names in ((path,), tuple(path.split("."))):
            values = list(_values(rows, names))
            if not values:
                continue
            try:
                kind = pa.array(values).type
            except (pa.ArrowException, UnicodeError, OverflowError) as error:
                raise pa.ArrowInvalid(f"column {path!r} is of several types: {error}") from error
            for name in reversed(names[1:]):
                kind = pa.struct([pa.field(name, kind)])
            schemas.append(pa.schema([pa.field(names[0], kind)]))
            break
    return _unify(schemas)


def _values(rows: Iterable[Any], names: tuple[str, ...]) -> Iterator[Any]:
    for row in rows:
        value = row
        for name in names:
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            yield value


def _merge(schema: pa.Schema, found: pa.Schema, wanted: Sequence[str]) -> pa.Schema:
    """The columns of both. Those that nobody wants are there to be named in messages."""
    merged = _unify([prune(schema, wanted), prune(found, wanted)])
    others = {f.name: f for f in [*found, *schema] if f.name not in merged.names}
    return pa.schema([*merged, *others.values()])


def _unify(schemas: list[pa.Schema]) -> pa.Schema:
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise pa.ArrowInvalid(f"a column is of several types: {error}") from error
