"""Many texts at a time: Arrow or lists in, arrays out, on all cores and within bounded memory."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from longformer_core.errors import TokenizerError
from longformer_core.tokenization.encoded import EncodedText, EncodedWords, IntArray
from longformer_core.tokenization.texts import what_is_no_text

if TYPE_CHECKING:
    import pyarrow as pa

# The library holds some hundred bytes per token while a batch is encoded. This many bytes of text
# at a time keep every core busy with documents and stay below half a gigabyte.
_BATCH_BYTES = 4 << 20
# The bytes of an ordinary word.
_WORD = 8


def encode_arrow(backend: Tokenizer, texts: "pa.Array | pa.ChunkedArray") -> "pa.LargeListArray":
    """Return the ids of each text with its special tokens, as Arrow lists; null for null."""
    import pyarrow as pa

    lengths = np.zeros(len(texts), dtype=np.int64)
    is_null = np.ones(len(texts), dtype=bool)
    parts = [np.zeros(0, dtype=np.int32)]
    for first, rows in _batches(_texts(texts)):
        numbers = [number for number, row in enumerate(rows, first) if row is not None]
        encodings = backend.encode_batch_fast([row for row in rows if row is not None])
        lengths[numbers], is_null[numbers] = [len(e) for e in encodings], False
        parts.extend(_ints(e.ids, len(e)) for e in encodings)
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values = pa.array(np.concatenate(parts))
    return pa.LargeListArray.from_arrays(pa.array(offsets), values, mask=pa.array(is_null))


def encode_with_offsets(
    backend: Tokenizer, texts: "pa.Array | pa.ChunkedArray | Sequence[str | None]"
) -> list[EncodedText | None]:
    """Return ids and characters of each whole text, without special tokens; None for none."""
    encoded: list[EncodedText | None] = []
    for encoding in _encodings(backend, _texts(texts), is_pretokenized=False):
        if encoding is None:
            encoded.append(None)
            continue
        count = len(encoding)
        spans = _ints(chain.from_iterable(encoding.offsets), 2 * count).reshape(count, 2)
        starts, ends = np.ascontiguousarray(spans.T)
        encoded.append(EncodedText(_ints(encoding.ids, count), starts, ends))
    return encoded


def encode_words(
    backend: Tokenizer, rows: "pa.Array | pa.ChunkedArray | Sequence[Sequence[str] | None]"
) -> list[EncodedWords | None]:
    """Return the ids of each list of words, without special tokens, and the word of each token."""
    return [
        None if e is None else EncodedWords(_ints(e.ids, len(e)), _ints(e.word_ids, len(e)))
        for e in _encodings(backend, _words(rows), is_pretokenized=True)
    ]


class _Rows:
    """Rows and their sizes in about bytes, without making Python objects of Arrow's."""

    def __init__(self, rows: Any, sizes: Sequence[int]) -> None:
        self.rows, self.sizes = rows, sizes

    def take(self, start: int, stop: int) -> list[Any]:
        """Return some rows as Python objects."""
        if not hasattr(self.rows, "to_pylist"):
            return list(self.rows[start:stop])
        try:
            return list(self.rows.slice(start, stop - start).to_pylist())
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"a text at or after row {start} is not valid UTF-8: {error}; decode the source "
                "with errors='replace'"
            ) from error


def _texts(texts: Any) -> _Rows:
    if not hasattr(texts, "to_pylist"):
        return _Rows(texts, [len(text) if isinstance(text, str) else 0 for text in texts])
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise TokenizerError(
            f"texts are a column of string or large_string, not {texts.type}; cast the column"
        )
    return _Rows(texts, pc.fill_null(pc.binary_length(texts), 0).to_pylist())


def _words(rows: Any) -> _Rows:
    if not hasattr(rows, "to_pylist"):
        return _Rows(rows, [_WORD * len(row) if isinstance(row, Sequence) else 0 for row in rows])
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = rows.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (is_list and kind.value_type in (pa.string(), pa.large_string())):
        raise TokenizerError(f"words are a column of list<string>, not {kind}; cast the column")
    lengths = pc.fill_null(pc.list_value_length(rows), 0).to_pylist()
    return _Rows(rows, [_WORD * length for length in lengths])


def _batches(rows: _Rows) -> Iterator[tuple[int, list[Any]]]:
    """Yield the number of the first row and rows of about `_BATCH_BYTES`; a longer one alone."""
    start, total = 0, 0
    for row, size in enumerate(rows.sizes):
        if row > start and total + size > _BATCH_BYTES:
            yield start, rows.take(start, row)
            start, total = row, 0
        total += size
    if start < len(rows.sizes):
        yield start, rows.take(start, len(rows.sizes))


def _encodings(
    backend: Tokenizer, rows: _Rows, *, is_pretokenized: bool
) -> Iterator[Encoding | None]:
    for _, batch in _batches(rows):
        given = [row for row in batch if row is not None]
        try:
            encodings = iter(
                backend.encode_batch(
                    given, is_pretokenized=is_pretokenized, add_special_tokens=False
                )
            )
        except TypeError as error:
            raise TokenizerError(what_is_no_text(given)) from error
        for row in batch:
            yield None if row is None else next(encodings)


def _ints(values: Iterable[Any], count: int) -> IntArray:
    return np.fromiter(values, dtype=np.int32, count=count)
