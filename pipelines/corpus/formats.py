"""What the formats of input have in common: pieces of a file, and the interface of a format.

A format looks at a file once, at listing, and later reads one piece of it at a time. Everything
else (ids, joined texts, kept columns, errors) is the same for all formats and lives elsewhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.fs as pafs

SLICE_ROWS = 256  # rows that a reader holds at once, at most
SLICE_BYTES = 64 * 2**20  # and the size it aims to stay below where rows are large
PIECE_BYTES = 16 * 2**20  # what one read task reads, where a file can be cut

_COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")


@dataclass(frozen=True)
class Source:
    """A file and where it lies."""

    filesystem: pafs.FileSystem
    path: str

    @property
    def is_compressed(self) -> bool:
        return self.path.lower().endswith(_COMPRESSED)

    def open(self) -> pa.NativeFile:
        """The bytes as they lie in storage."""
        return self.filesystem.open_input_file(self.path)

    def stream(self) -> pa.NativeFile:
        """The bytes from the first on, decompressed by the ending of the name."""
        return self.filesystem.open_input_stream(self.path, compression="detect")


@dataclass(frozen=True)
class Piece:
    """A part of a file that can be read alone: `start` to `stop` in what the format counts."""

    first_row: int  # in the file
    num_rows: int  # rows used: `--limit` may cut
    start: int
    stop: int


@dataclass(frozen=True)
class Inspected:
    """What a format finds in a file without reading its texts into memory at once."""

    schema: pa.Schema
    pieces: tuple[Piece, ...]
    all_null: frozenset[str] = frozenset()  # wanted columns known to hold nothing but nulls

    @property
    def num_rows(self) -> int:
        return sum(piece.num_rows for piece in self.pieces)


class Format(Protocol):
    """One way to store rows."""

    name: str

    def inspect(self, source: Source, wanted: Sequence[str]) -> Inspected:
        """Find columns and rows.

        Raises: OSError, ValueError or an ArrowException if the file is not in this format.
        """
        ...

    def rows(
        self, source: Source, piece: Piece, wanted: Sequence[str], schema: pa.Schema
    ) -> Iterator[tuple[pa.Table, str | None]]:
        """Yield slices of a piece's rows, and why a slice has nulls that are not in the file."""
        ...


def stem(name: str) -> str:
    """The name in lower case without the ending of a compression."""
    name = name.lower()
    return name.rpartition(".")[0] if name.endswith(_COMPRESSED) else name


def check_beginning(source: Source) -> None:
    """Raise ValueError for what is a file of another kind whatever its name says."""
    with source.open() as file:
        beginning = file.read(64)
    if beginning.startswith(b"version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer, not the data: run `git lfs pull`")
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is text in UTF-16; save it as UTF-8")
