"""Text to ids and back, over the `tokenizers` library: every tokenizer of a model directory.

RoBERTa's byte-level BPE, which Longformer and LED share, BERT's WordPiece, and the Unigram of XLM-R
and CamemBERT are told apart by their files; one class serves them all.

Calling a tokenizer gives what the published classes give: whole documents, unless truncation was
asked for. A batch is spread over all cores with the interpreter lock released, and calls from many
threads do not disturb each other (TOKENIZERS_PARALLELISM=false in the environment means one core).
"""

import logging
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from longformer_core.errors import TokenizerError
from longformer_core.tokenization import bulk
from longformer_core.tokenization.batch_encoding import (
    PADDING,
    SIDES,
    BatchEncoding,
    EncodeOptions,
    check_choice,
)
from longformer_core.tokenization.encoded import EncodedText, EncodedWords, IntArray, ModelInput
from longformer_core.tokenization.padding import FILLS, filled, plain, plain_columns
from longformer_core.tokenization.texts import rows_of, what_is_no_text
from longformer_core.tokenization.vocabulary import NO_LIMIT, Vocabulary, copy_rules

if TYPE_CHECKING:
    import pyarrow as pa

_logger = logging.getLogger(__name__)

# The column of a result, and where the library's encoding has it.
_COLUMNS = {
    "input_ids": "ids",
    "token_type_ids": "type_ids",
    "attention_mask": "attention_mask",
    "special_tokens_mask": "special_tokens_mask",
    "offset_mapping": "offsets",
}
# English writes these without the space before them (and the quotation mark without either).
_JOINED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class LongformerTokenizerFast(Vocabulary):
    """Encode texts and pairs with the special tokens of the model around them, and decode ids.

    RoBERTa, Longformer and LED: `<s> text </s>`, `<s> a </s></s> b </s>`. BERT: `[CLS] text [SEP]`,
    `[CLS] a [SEP] b [SEP]` with token types 0 and 1; its [CLS] and [SEP] also begin and end a text.
    Special tokens written out in a text ("</s>") become their ids unless `split_special_tokens`.
    Raises: TokenizerError for unknown options, for texts that are no strings, and as `Vocabulary`.
    Source: transformers' tokenizers of these models; RoBERTa's `<mask>` takes the space before it.
    """

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
        columns, kind = plain_columns(encoded_inputs)
        is_single = bool(columns["input_ids"]) and not isinstance(columns["input_ids"][0], list)
        if is_single:
            columns = {name: [column] for name, column in columns.items()}
        lengths = [len(ids) for ids in columns["input_ids"]]
        if return_attention_mask is not False:
            columns.setdefault("attention_mask", [[1] * length for length in lengths])
        target = self._padded_length(lengths, padding, max_length, pad_to_multiple_of)
        if target is not None:
            for name, fill in {"input_ids": self.pad_token_id, **FILLS}.items():
                if name in columns:
                    columns[name] = [filled(row, target, fill, side) for row in columns[name]]
        if is_single:
            columns = {name: rows[0] for name, rows in columns.items()}
        return BatchEncoding(columns, tensor_type=return_tensors or kind)

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Return the ids of `build` as a list, under the published name."""
        return list(self.build(token_ids_0, token_ids_1).ids.tolist())

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
            built = self.build(token_ids_0, token_ids_1)
            mask = np.ones_like(built.ids)
            for start, ids in zip(built.starts, (token_ids_0, token_ids_1 or ()), strict=False):
                mask[start : start + len(ids)] = 0
            return list(mask.tolist())
        if token_ids_1 is not None:
            raise TokenizerError("ids that have their special tokens hold both texts; give one")
        special = set(self.all_special_ids)
        return [int(int(i) in special) for i in token_ids_0]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """Return the type of each token of `build`: zeros, but ones for BERT's second text."""
        return list(self.build(token_ids_0, token_ids_1).token_type_ids.tolist())

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return how many special tokens stand around a text, or around a pair."""
        return int(self._backend.num_special_tokens_to_add(pair))

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """Return the text of some ids (a list of texts for lists of ids), as `batch_decode`."""
        ids = plain(token_ids)
        is_batch = isinstance(ids, list | tuple) and bool(ids) and isinstance(ids[0], list | tuple)
        texts = self.batch_decode(
            ids if is_batch else [ids], skip_special_tokens, clean_up_tokenization_spaces
        )
        return texts if is_batch else texts[0]

    def batch_decode(
        self,
        sequences: Iterable[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Return the text of each sequence of ids, on all cores.

        Bytes that are not UTF-8 become U+FFFD. Cleaning up joins punctuation to the word before it;
        None leaves that to the directory's settings, and is off for byte-level BPE, whose tokens
        hold their spaces: what the model wrote would no longer be what is returned.
        Raises: TokenizerError for ids that are negative, such as the padding of labels.
        """
        given = [plain(ids) for ids in sequences]
        rows = [[ids] if isinstance(ids, int) else [int(i) for i in ids] for ids in given]
        try:
            texts = self._backend.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise TokenizerError(
                f"an id is negative or beyond 32 bits; ids lie in [0, {len(self)}); "
                "remove label padding such as -100 first"
            ) from error
        cleans = clean_up_tokenization_spaces
        if cleans is None:
            stored = self._settings.get("clean_up_tokenization_spaces", False)
            cleans = self._algorithm.cleans_up and stored
        return [_cleaned(text) for text in texts] if cleans else list(texts)

    def encode_arrow(self, texts: "pa.Array | pa.ChunkedArray") -> "pa.LargeListArray":
        """Return the ids of each document with its special tokens as Arrow lists; null for null.

        Documents are spread over all cores. Memory above the result is bounded by a few megabytes
        of text at a time, or by the longest document.
        Shapes: n strings (string or large_string) to n lists of int32.
        Raises: TokenizerError for another type of array, and for bytes that are not UTF-8.
        """
        return bulk.encode_arrow(self._backend_for(EncodeOptions(), is_pair=False), texts)

    def encode_with_offsets(
        self, texts: "pa.Array | pa.ChunkedArray | Sequence[str | None]"
    ) -> list[EncodedText | None]:
        """Return the ids of whole texts without special tokens, and the characters of each token.

        Offsets are in code points of the text as it was given; where several tokens share a
        character, as an emoji's bytes do, each has all of it. Memory and cores: as `encode_arrow`.
        Shapes: n strings to n EncodedText; None for a null text.
        Raises: TokenizerError as `encode_arrow`, and for texts that are no strings.
        """
        return bulk.encode_with_offsets(self._backend_for(EncodeOptions(), is_pair=False), texts)

    def encode_words(
        self, rows: "pa.Array | pa.ChunkedArray | Sequence[Sequence[str] | None]"
    ) -> list[EncodedWords | None]:
        """Return the ids of lists of words without special tokens, and the word of each token.

        Byte-level BPE encodes each word as if a space came before it. A word may have no token.
        Shapes: n lists of strings to n EncodedWords; None for a null list.
        Raises: TokenizerError as `encode_arrow`, and for words that are no strings.
        """
        prefix = True if self._has_prefix_space else None
        options = EncodeOptions(is_split_into_words=True, add_prefix_space=prefix)
        return bulk.encode_words(self._backend_for(options, is_pair=False), rows)

    def build(
        self,
        ids: "Sequence[int] | IntArray",
        pair_ids: "Sequence[int] | IntArray | None" = None,
    ) -> ModelInput:
        """Put the special tokens around the ids of a text or of a pair, as a call does."""
        given = [ids] if pair_ids is None else [ids, pair_ids]
        around = self._backend.encode("a", None if pair_ids is None else "a")
        pieces, types, starts, length = [], [], [], 0
        for origin, slots in groupby(range(len(around)), around.sequence_ids.__getitem__):
            first, *rest = slots
            if origin is None:
                piece: Sequence[int] | IntArray = [around.ids[slot] for slot in (first, *rest)]
            else:
                starts.append(length)
                piece = given[origin]
            pieces.append(np.asarray(piece, dtype=np.int32))
            types.append(np.full(len(piece), around.type_ids[first], dtype=np.int32))
            length += len(piece)
        return ModelInput(np.concatenate(pieces), np.concatenate(types), tuple(starts))

    def _encode(self, text: Any, pair: Any, options: EncodeOptions) -> BatchEncoding:
        rows, is_batch = rows_of(text, pair, options.is_split_into_words)
        backend = self._backend_for(options, is_pair=pair is not None)
        encodings = _run(backend, rows, options)
        keeps_all = options.return_overflowing_tokens
        windows = [[e, *e.overflowing] if keeps_all else [e] for e in encodings]
        flat = [encoding for row in windows for encoding in row]
        self._pad_encodings(flat, options)
        data: dict[str, Any] = {
            name: [getattr(e, _COLUMNS[name]) for e in flat]
            for name in options.columns(self.model_input_names)
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
        if prefix is not None and not self._has_prefix_space:
            raise TokenizerError("add_prefix_space is a rule of byte-level BPE, not of this one")
        prefix = self.add_prefix_space if prefix is None else prefix
        split = self.split_special_tokens if split is None else split
        if options.is_split_into_words and self._has_prefix_space and not prefix:
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
            self._algorithm.lay_out(backend, {"add_prefix_space": prefix})
            self._frame(backend)
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


def load_tokenizer(directory: str | Path, **settings: Any) -> LongformerTokenizerFast:
    """Read the tokenizer of a model directory, hub id or URL, whatever its algorithm.

    Example: `load_tokenizer("longformer").encode_with_offsets(["One text."])`
    Raises: TokenizerError, CheckpointError as `LongformerTokenizer.from_pretrained`.
    """
    return LongformerTokenizerFast.from_pretrained(directory, **settings)


LongformerTokenizer = LongformerTokenizerFast
LEDTokenizer = LEDTokenizerFast


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
        raise TokenizerError(what_is_no_text(rows)) from error
    except BaseException as error:
        # The library panics, below Exception, where the fixed text of a pair leaves a window that
        # is not longer than the stride.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"truncation to max_length {options.max_length} with stride {options.stride} has no "
            f"room beside the text of a pair that may not be cut: {error}"
        ) from error


def _cleaned(text: str) -> str:
    for piece in _JOINED:
        text = text.replace(piece, piece.strip())
    return text
