"""CSV and TSV: every column is read as strings, exactly as it stands in the file.

No type is guessed: an id 007 stays 007, and a kept column carries its letters. An empty field is an
empty string, since a file cannot tell it from null. Blank lines are no rows. Quoted fields may hold
line breaks, so a file cannot be cut without reading it from its start: one task reads it.
"""

import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.csv as pcsv

from pipelines.corpus import formats
from pipelines.corpus.columns import select
from pipelines.corpus.formats import Inspected, Piece, Source

_BLOCK_BYTES = 4 * 2**20
_LARGEST_BLOCK = 2**28


class Delimited:
    """A piece is the whole file."""

    def __init__(self, name: str, delimiter: str) -> None:
        self.name, self.delimiter = name, delimiter

    def inspect(self, source: Source, wanted: Sequence[str]) -> Inspected:
        del wanted
        names = next(self._batches(source, [])).schema.names
        # Arrow takes a quote that is never closed for the rest of the file, without a word: then
        # a row put after the end does not come out as a row.
        last = self.delimiter.join([_LAST, *[""] * (len(names) - 1)])
        num_rows, ends_with = 0, None
        for batch in self._batches(source, names[:1], f"\n{last}\n".encode()):
            num_rows += batch.num_rows
            if batch.num_rows:
                ends_with = batch.column(0)[-1].as_py()
        if ends_with != _LAST:
            raise ValueError("its last quote is never closed")
        schema = pa.schema([pa.field(name, pa.large_string()) for name in names])
        piece = Piece(0, num_rows - 1, 0, 1)
        return Inspected(schema, (piece,) if piece.num_rows else ())

    def rows(
        self, source: Source, piece: Piece, wanted: Sequence[str], schema: pa.Schema
    ) -> Iterator[tuple[pa.Table, str | None]]:
        del piece, schema
        for batch in self._batches(source, wanted):
            table = select(pa.Table.from_batches([batch]), wanted)
            for start in range(0, table.num_rows, formats.SLICE_ROWS):
                yield table.slice(start, formats.SLICE_ROWS), None

    def _batches(
        self, source: Source, columns: Sequence[str], after: bytes = b""
    ) -> Iterator[pa.RecordBatch]:
        """An empty batch, then the rows in order.

        A row must fit into a block: where one does not, larger blocks go on.
        """
        done, block_bytes = -1, _BLOCK_BYTES
        while True:
            skipped = 0
            try:
                with source.stream() as stream:
                    file = io.BufferedReader(_Followed(stream, after)) if after else stream
                    reader = self._open(file, block_bytes, columns)
                    if done < 0:
                        done = 0
                        yield pa.RecordBatch.from_pylist([], reader.schema)
                    for batch in reader:
                        new = batch.slice(max(done - skipped, 0))
                        skipped += batch.num_rows
                        if new.num_rows:
                            yield new
                            done += new.num_rows
                return
            except pa.ArrowInvalid as error:
                if "straddling object" not in str(error):
                    raise
                if block_bytes >= _LARGEST_BLOCK:
                    raise pa.ArrowInvalid(
                        f"a row takes more than {_LARGEST_BLOCK:,} bytes, or a quote is not closed"
                    ) from error
                block_bytes *= 4

    def _open(
        self, stream: pa.NativeFile | io.BufferedReader, block_bytes: int, columns: Sequence[str]
    ) -> pcsv.CSVStreamingReader:
        return pcsv.open_csv(
            stream,
            read_options=pcsv.ReadOptions(use_threads=False, block_size=block_bytes),
            parse_options=pcsv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
            convert_options=pcsv.ConvertOptions(
                # Bytes that are not UTF-8 make error rows, as in other formats.
                check_utf8=False,
                default_column_type=pa.large_string(),
                include_columns=list(columns),
            ),
        )


_LAST = "longhaul: the row after the last"


class _Followed(io.RawIOBase):
    """A stream with some bytes after its end."""

    def __init__(self, stream: pa.NativeFile, after: bytes) -> None:
        self._stream, self._after = stream, after

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        if not data:
            data, self._after = self._after[: len(buffer)], self._after[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
