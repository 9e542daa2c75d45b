"""Text to ids and back: RoBERTa's byte-level BPE, which LED shares, over the `tokenizers` library.

Calling a tokenizer gives what the published classes give: whole documents, unless truncation was
asked for. A batch is spread over all cores with the interpreter lock released, and calls from many
threads do not disturb each other (TOKENIZERS_PARALLELISM=false in the environment means one core).
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from longformer_core.errors import TokenizerError
from longformer_core.tokenization.batch_encoding import (
    PADDING,
    SIDES,
    BatchEncoding,
    EncodeOptions,
    check_choice,
)
from longformer_core.tokenization.vocabulary import NO_LIMIT, Vocabulary, copy_rules

if TYPE_CHECKING:
    import pyarrow as pa

_logger = logging.getLogger(__name__)

# The library holds some hundred bytes per token while a batch is encoded. This many bytes of text
# at a time keep every core busy with documents and stay below half a gigabyte.
_BATCH_BYTES = 4 << 20

# The column of a result, and where the library's encoding has it.
_COLUMNS = {
    "input_ids": "ids",
    "token_type_ids": "type_ids",
    "attention_mask": "attention_mask",
    "special_tokens_mask": "special_tokens_mask",
    "offset_mapping": "offsets",
}
# What padding is made of. In a global mask 0 means local attention, so padding needs another value.
_FILLS = {
    "attention_mask": 0,
    "token_type_ids": Vocabulary.pad_token_type_id,
    "special_tokens_mask": 1,
    "global_attention_mask": -1,
}
# English writes these without the space before them (and the quotation mark without either).
_JOINED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class LongformerTokenizerFast(Vocabulary):
    """Encode texts as `<s> text </s>`, pairs as `<s> a </s></s> b </s>`, and decode ids.

    Special tokens written out in a text ("</s>") become their ids unless `split_special_tokens`.
    Raises: TokenizerError for unknown options, for texts that are no strings, and as `Vocabulary`.
    Source: the RoBERTa layout of transformers' tokenizers; `<mask>` takes the space before it.
    """

    model_input_names = ("input_ids", "attention_mask")
    _logged: frozenset[str] = frozenset()

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        **options: Any,
    ) -> BatchEncoding:
        """Encode a text, a pair, or a batch of either; `options` are the fields of EncodeOptions.

        A text is a string, or with `is_split_into_words` a list of words; a batch is a list of
        them. The ids of `text_target` become the column `labels`, or, alone, the result.
        Shapes: one list per row; for a single text the list itself, but one row when tensors or
        further windows are asked for.
        Raises: TokenizerError as the class; for pre-split words without a prefix space; when
        `max_length` has no room for what may not be cut, or for a window beside its stride.
        """
        chosen = EncodeOptions.of(options)
        if text is None and text_target is None:
            raise TokenizerError("there is nothing to encode: give text, text_target, or both")
        if text_target is None:
            return self._encode(text, text_pair, chosen)
        target = self._encode(text_target, text_pair_target, chosen)
        if text is None:
            return target
        encoded = self._encode(text, text_pair, chosen)
        encoded["labels"] = target["input_ids"]
        return encoded

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """Return the ids alone: a list for a text, a list of lists for a batch."""
        return self(text, text_pair, **options)["input_ids"]

    def encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """Encode one text or pair: the older name of calling the tokenizer."""
        return self(text, text_pair, **options)

    def batch_encode_plus(self, texts_or_pairs: Sequence[Any], **options: Any) -> BatchEncoding:
        """Encode a list of texts, or of pairs as tuples: the older name of calling the tokenizer.

        Raises: TokenizerError as a call.
        """
        return self(list(texts_or_pairs), **options)

    def tokenize(self, text: str, pair: str | None = None, **options: Any) -> list[str]:
        """Return the tokens of a text as the vocabulary spells them, without special ones."""
        return self(text, pair, **{"add_special_tokens": False, **options}).tokens()

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Bring encoded texts to one length: a mapping of columns, or a list of mappings (rows).

        `global_attention_mask` is padded with -1; columns of the caller's own are left as they are.
        Arrays and tensors are answered in kind.
        Raises: TokenizerError when there are no `input_ids`, or a tensor cannot be made.
        """
        check_choice("padding", padding, PADDING)
        side = self._padding_side(padding_side)
        columns, kind = _plain_columns(encoded_inputs)
        is_single = bool(columns["input_ids"]) and not isinstance(columns["input_ids"][0], list)
        if is_single:
            columns = {name: [column] for name, column in columns.items()}
        lengths = [len(ids) for ids in columns["input_ids"]]
        if return_attention_mask is not False:
            columns.setdefault("attention_mask", [[1] * length for length in lengths])
        target = self._padded_length(lengths, padding, max_length, pad_to_multiple_of)
        if target is not None:
            for name, fill in {"input_ids": self.pad_token_id, **_FILLS}.items():
                if name in columns:
                    columns[name] = [_filled(row, target, fill, side) for row in columns[name]]
        if is_single:
            columns = {name: rows[0] for name, rows in columns.items()}
        return BatchEncoding(columns, tensor_type=return_tensors or kind)

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Put the special tokens around the ids of a text or of a pair."""
        cls, sep = self.cls_token_id, self.sep_token_id
        first = [cls, *token_ids_0, sep]
        return first if token_ids_1 is None else [*first, sep, *token_ids_1, sep]

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Return 1 for every special token and 0 for the others.

        Shapes: as `build_inputs_with_special_tokens` returns, or `token_ids_0` if it has them.
        Raises: TokenizerError for a second text beside ids that have their special tokens.
        """
        if not already_has_special_tokens:
            first = [1, *[0] * len(token_ids_0), 1]
            return first if token_ids_1 is None else [*first, 1, *[0] * len(token_ids_1), 1]
        if token_ids_1 is not None:
            raise TokenizerError("ids that have their special tokens hold both texts; give one")
        special = set(self.all_special_ids)
        return [int(int(i) in special) for i in token_ids_0]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Return zeros for a text or pair and its special tokens: these models have one type."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return how many special tokens stand around a text, or around a pair."""
        return int(self._backend.num_special_tokens_to_add(pair))

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> Any:
        """Return the text of some ids (a list of texts for lists of ids), as `batch_decode`."""
        ids = _plain(token_ids)
        is_batch = isinstance(ids, list | tuple) and bool(ids) and isinstance(ids[0], list | tuple)
        texts = self.batch_decode(
            ids if is_batch else [ids], skip_special_tokens, clean_up_tokenization_spaces
        )
        return texts if is_batch else texts[0]

    def batch_decode(
        self,
        sequences: Iterable[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> list[str]:
        """Return the text of each sequence of ids, on all cores.

        Bytes that are not UTF-8 become U+FFFD. Cleaning up joins punctuation to the word before it;
        what the model wrote is then no longer what is returned, so it is off unless asked for.
        Raises: TokenizerError for ids that are negative, such as the padding of labels.
        """
        plain = [_plain(ids) for ids in sequences]
        rows = [[ids] if isinstance(ids, int) else [int(i) for i in ids] for ids in plain]
        try:
            texts = self._backend.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise TokenizerError(
                f"an id is negative or beyond 32 bits; ids lie in [0, {len(self)}); "
                "remove label padding such as -100 first"
            ) from error
        return [_cleaned(text) for text in texts] if clean_up_tokenization_spaces else list(texts)

    def encode_arrow(self, texts: "pa.Array | pa.ChunkedArray") -> "pa.LargeListArray":
        """Return the ids of each document, with `<s>` and `</s>`, as Arrow lists; null for null.

        Documents are spread over all cores. Memory above the result is bounded by a few megabytes
        of text at a time, or by the longest document.
        Shapes: n strings (string or large_string) to n lists of int32.
        Raises: TokenizerError for another type of array, and for bytes that are not UTF-8.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
            raise TokenizerError(
                f"encode_arrow takes string or large_string, not {texts.type}; cast the column"
            )
        backend = self._backend_for(EncodeOptions(), is_pair=False)
        sizes = pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)
        is_valid = texts.is_valid().to_numpy(zero_copy_only=False)
        lengths = np.zeros(len(texts), dtype=np.int64)
        parts = [np.zeros(0, dtype=np.int32)]
        for start, stop in _spans(sizes):
            rows = start + np.flatnonzero(is_valid[start:stop])
            documents = _strings(texts.slice(start, stop - start).drop_null(), start)
            encodings = backend.encode_batch_fast(documents)
            lengths[rows] = [len(encoding) for encoding in encodings]
            parts.extend(np.fromiter(e.ids, dtype=np.int32, count=len(e)) for e in encodings)
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        values = pa.array(np.concatenate(parts))
        return pa.LargeListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~is_valid))

    def _encode(self, text: Any, pair: Any, options: EncodeOptions) -> BatchEncoding:
        rows, is_batch = _rows(text, pair, options.is_split_into_words)
        backend = self._backend_for(options, is_pair=pair is not None)
        encodings = _run(backend, rows, options)
        keeps_all = options.return_overflowing_tokens
        windows = [[e, *e.overflowing] if keeps_all else [e] for e in encodings]
        flat = [encoding for row in windows for encoding in row]
        self._pad_encodings(flat, options)
        data: dict[str, Any] = {
            name: [getattr(e, _COLUMNS[name]) for e in flat] for name in options.columns()
        }
        if not (is_batch or keeps_all or options.return_tensors):
            data = {name: column[0] for name, column in data.items()}
        if options.return_length:
            data["length"] = [len(e) for e in flat]
        if keeps_all:
            data["overflow_to_sample_mapping"] = [i for i, row in enumerate(windows) for _ in row]
        if options.verbose and options.max_length is None:
            self._log_length(max(map(len, flat), default=0))
        return BatchEncoding(data, flat, options.return_tensors)

    def _backend_for(self, options: EncodeOptions, *, is_pair: bool) -> Tokenizer:
        """Return the backend itself, or a copy with the limits and rules of one call."""
        prefix, split = options.add_prefix_space, options.split_special_tokens
        prefix = self.add_prefix_space if prefix is None else prefix
        split = self.split_special_tokens if split is None else split
        if options.is_split_into_words and not prefix:
            raise TokenizerError(
                "pre-split words would be glued together without the spaces between them; set "
                "add_prefix_space=True, here or in from_pretrained"
            )
        truncation = self._truncation(options)
        if truncation is None and not split and prefix == self.add_prefix_space:
            return self._backend
        backend = copy_rules(self._backend)
        backend.encode_special_tokens = split
        if prefix != self.add_prefix_space:
            self._lay_out(backend, prefix)
        if truncation is not None:
            strategy, max_length = truncation
            room = max_length - options.add_special_tokens * self.num_special_tokens_to_add(is_pair)
            if room < 0 or options.stride >= max(room, 1):
                raise TokenizerError(
                    f"max_length {max_length} has room for {room} tokens beside the special ones, "
                    f"and stride is {options.stride}; raise max_length or lower stride"
                )
            side = self.truncation_side
            check_choice("truncation_side", side, SIDES)
            backend.enable_truncation(
                max_length, stride=options.stride, strategy=strategy, direction=side
            )
        return backend

    def _truncation(self, options: EncodeOptions) -> tuple[str, int] | None:
        """Return the strategy and the number of tokens to cut to; None for whole texts."""
        wanted = options.truncation
        if wanted is None:
            wanted = options.max_length is not None and options.padding is False
        if wanted in (False, "do_not_truncate"):
            return None
        limit = options.max_length
        limit = self._model_limit("truncation") if limit is None else limit
        if limit is None:
            return None
        multiple = options.pad_to_multiple_of or 1
        if options.padding not in (False, "do_not_pad") and limit % multiple:
            raise TokenizerError(
                f"texts cut to {limit} tokens cannot be padded to a multiple of {multiple}; make "
                "max_length such a multiple"
            )
        return ("longest_first" if wanted is True else str(wanted)), limit

    def _pad_encodings(self, encodings: list[Encoding], options: EncodeOptions) -> None:
        length = self._padded_length(
            [len(e) for e in encodings],
            options.padding,
            options.max_length,
            options.pad_to_multiple_of,
        )
        if length is not None:
            side = self._padding_side(options.padding_side)
            pad = {"pad_id": self.pad_token_id, "pad_token": self.pad_token, "direction": side}
            for encoding in encodings:
                encoding.pad(length, pad_type_id=self.pad_token_type_id, **pad)

    def _padding_side(self, of_call: str | None) -> str:
        side = self.padding_side if of_call is None else of_call
        check_choice("padding_side", side, SIDES)
        return side

    def _padded_length(
        self,
        lengths: Sequence[int],
        padding: bool | str,
        max_length: int | None,
        multiple: int | None,
    ) -> int | None:
        if padding in (False, "do_not_pad"):
            return None
        length: int | None = max(lengths, default=0)
        if padding == "max_length":
            length = self._model_limit("padding") if max_length is None else max_length
        if length is None:
            return None
        multiple = multiple or 1
        return -(-length // multiple) * multiple

    def _model_limit(self, purpose: str) -> int | None:
        if self.model_max_length < NO_LIMIT:
            return self.model_max_length
        self._log_once(
            f"no {purpose}: there is no max_length, and the tokenizer has no model_max_length"
        )
        return None

    def _log_length(self, length: int) -> None:
        if length > self.model_max_length:
            self._log_once(
                f"a text is longer than the {self.model_max_length} tokens of the model "
                "(model_max_length); set truncation or max_length, or cut it into windows"
            )

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged |= {message}
            _logger.warning(message)


class LEDTokenizerFast(LongformerTokenizerFast):
    """The tokenizer of LED, which is Longformer's under the name that its directories give."""

    _published_name = "LEDTokenizer"


LongformerTokenizer = LongformerTokenizerFast
LEDTokenizer = LEDTokenizerFast


def _rows(text: Any, pair: Any, is_split: bool) -> tuple[list[Any], bool]:
    """Return the rows to encode, pairs as tuples, and whether the caller gave a batch."""
    is_batch = isinstance(text, list | tuple)
    if is_split:
        is_batch = is_batch and bool(text) and isinstance(text[0], list | tuple)
    if not is_batch:
        return [text if pair is None else (text, pair)], False
    if pair is None:
        return list(text), True
    if isinstance(pair, str) or len(pair) != len(text):
        found = "one text" if isinstance(pair, str) else f"{len(pair)} texts"
        raise TokenizerError(f"a batch of {len(text)} texts needs as many text_pair, not {found}")
    return list(zip(text, pair, strict=True)), True


def _run(backend: Tokenizer, rows: list[Any], options: EncodeOptions) -> list[Encoding]:
    try:
        return list(
            backend.encode_batch(
                rows,
                is_pretokenized=options.is_split_into_words,
                add_special_tokens=options.add_special_tokens,
            )
        )
    except TypeError as error:
        raise TokenizerError(_what_is_no_text(rows)) from error
    except BaseException as error:
        # The library panics, below Exception, where the fixed text of a pair leaves a window that
        # is not longer than the stride.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"truncation to max_length {options.max_length} with stride {options.stride} has no "
            f"room beside the text of a pair that may not be cut: {error}"
        ) from error


def _what_is_no_text(rows: list[Any]) -> str:
    for number, row in enumerate(rows):
        for text in _leaves(row):
            if not isinstance(text, str):
                return f"row {number} holds {type(text).__name__} where a string belongs"
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                return (
                    f"row {number} is not valid Unicode, it holds half of a surrogate pair; decode "
                    "the source with errors='replace'"
                )
    return "a row is neither a text nor a pair; lists of words need is_split_into_words=True"


def _leaves(row: Any) -> Iterable[Any]:
    if isinstance(row, list | tuple):
        for part in row:
            yield from _leaves(part)
    else:
        yield row


def _plain_columns(encoded: Any) -> tuple[dict[str, Any], str | None]:
    """Return columns as lists of ints, and the kind of tensor that they came as."""
    if not isinstance(encoded, Mapping):
        rows = list(encoded)
        names = rows[0].keys() if rows else ("input_ids",)
        if any(row.keys() != names for row in rows):
            raise TokenizerError("rows to be padded together must have the same columns")
        encoded = {name: [row[name] for row in rows] for name in names}
    if "input_ids" not in encoded:
        raise TokenizerError(f"there are no input_ids to pad among {sorted(encoded)}")
    ids = encoded["input_ids"]
    first = ids if hasattr(ids, "tolist") or not len(ids) else ids[0]
    kind = "np" if isinstance(first, np.ndarray) else "pt" if hasattr(first, "tolist") else None
    return {name: _plain(column) for name, column in encoded.items()}, kind


def _plain(values: Any) -> Any:
    """Return arrays and tensors, and lists of them, as lists of numbers."""
    if hasattr(values, "tolist"):
        return values.tolist()
    is_nested = isinstance(values, list | tuple) and values and hasattr(values[0], "tolist")
    return [value.tolist() for value in values] if is_nested else values


def _filled(row: list[int], length: int, fill: int, side: str) -> list[int]:
    filling = [fill] * (length - len(row))
    return filling + row if side == "left" else row + filling


def _cleaned(text: str) -> str:
    for piece in _JOINED:
        text = text.replace(piece, piece.strip())
    return text


def _strings(texts: "pa.Array | pa.ChunkedArray", first_row: int) -> list[str]:
    try:
        return list(texts.to_pylist())
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"a text at or after row {first_row} is not valid UTF-8: {error}; decode the source "
            "with errors='replace'"
        ) from error


def _spans(sizes: np.ndarray) -> Iterable[tuple[int, int]]:
    """Cut rows into runs of about `_BATCH_BYTES` of text; a longer row stands alone."""
    start, total = 0, 0
    for row, size in enumerate(sizes.tolist()):
        if row > start and total + size > _BATCH_BYTES:
            yield start, row
            start, total = row, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)
