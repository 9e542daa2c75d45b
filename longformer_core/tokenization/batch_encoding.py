"""What a call of a tokenizer may ask for, and its answer: columns, and where each token came from.

Shapes: a column of a batch is one list per row, of one length where the batch was padded; of a
single text it is the list itself. Positions of characters, words and tokens count from 0.
"""

from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

from longformer_core.errors import TokenizerError, did_you_mean

_TENSORS = ("pt", "np")
PADDING = (False, True, "do_not_pad", "longest", "max_length")
_TRUNCATION = (None, False, True, "do_not_truncate", "longest_first", "only_first", "only_second")
SIDES = ("right", "left")


class CharSpan(NamedTuple):
    """Characters `start` to `end` (exclusive) of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens `start` to `end` (exclusive) of a row."""

    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """What a call of a tokenizer may ask for. Lengths are in tokens, special ones included.

    Raises: TokenizerError for a value that is not among the choices.
    """

    add_special_tokens: bool = True
    # True or "longest": to the longest row. "max_length": to max_length or model_max_length.
    padding: bool | str = False
    # True or "longest_first": token by token from the longer text of a pair. None: only where
    # max_length is given and padding is not.
    truncation: bool | str | None = None
    max_length: int | None = None
    # How many tokens each further window of a truncated text repeats from the one before it.
    stride: int = 0
    is_split_into_words: bool = False
    pad_to_multiple_of: int | None = None
    padding_side: str | None = None
    return_tensors: str | None = None
    return_token_type_ids: bool | None = None
    return_attention_mask: bool | None = None
    # One row per window, and the column overflow_to_sample_mapping; else the first window alone.
    return_overflowing_tokens: bool = False
    return_special_tokens_mask: bool = False
    return_offsets_mapping: bool = False
    return_length: bool = False
    # Whether to log, once, that a text is longer than model_max_length.
    verbose: bool = True
    # None is the tokenizer's own setting.
    split_special_tokens: bool | None = None
    add_prefix_space: bool | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "EncodeOptions":
        """Check the names of options, then their values."""
        known = [field.name for field in fields(cls)]
        for name in options.keys() - set(known):
            raise TokenizerError(f"a tokenizer has no option {name!r}{did_you_mean(name, known)}")
        return cls(**options)

    def __post_init__(self) -> None:
        check_choice("padding", self.padding, PADDING)
        check_choice("truncation", self.truncation, _TRUNCATION)
        check_choice("padding_side", self.padding_side, (None, *SIDES))
        for name, least in (("max_length", 0), ("stride", 0), ("pad_to_multiple_of", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise TokenizerError(f"{name} is {value}; it must be {least} or more")

    def columns(self, model_input_names: tuple[str, ...]) -> list[str]:
        """Return the names of the columns to build from encodings of a model's tokenizer."""
        types = self.return_token_type_ids
        asked = {
            "input_ids": True,
            "token_type_ids": "token_type_ids" in model_input_names if types is None else types,
            "attention_mask": self.return_attention_mask is not False,
            "special_tokens_mask": self.return_special_tokens_mask,
            "offset_mapping": self.return_offsets_mapping,
        }
        return [name for name, is_asked in asked.items() if is_asked]


class BatchEncoding(UserDict[str, Any]):
    """The columns of encoded texts, by key (`batch["input_ids"]`) and by name (`batch.input_ids`).

    `batch[0]` is the library's encoding of row 0, with its tokens, offsets and word ids. A position
    method takes `(row, position)`, or the position alone in row 0. In a pair `sequence_index` 0 is
    the first text and 1 the second; tokens that came from no text have None for their word.
    Raises: TokenizerError for a position method of columns that were not encoded here, for rows of
    different lengths that shall become a tensor, and for an unknown kind of tensor.
    """

    def __init__(
        self,
        data: dict[str, Any] | None = None,
        encodings: list[Any] | None = None,
        tensor_type: str | None = None,
    ) -> None:
        super().__init__(data or {})
        self.encodings = encodings
        self.convert_to_tensors(tensor_type)

    def __getitem__(self, key: Any) -> Any:
        """Return a column, the encoding of a row, or a slice of every column."""
        if isinstance(key, str):
            return self.data[key]
        if isinstance(key, slice):
            return {name: column[key] for name, column in self.data.items()}
        return self._row(key)

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for attributes before there is any data.
        columns = self.__dict__.get("data", {})
        if name not in columns:
            raise AttributeError(f"there is no column {name!r}{did_you_mean(name, columns)}")
        return columns[name]

    @property
    def is_fast(self) -> bool:
        """Whether the position methods work: the texts were encoded here."""
        return self.encodings is not None

    @property
    def n_sequences(self) -> int | None:
        """Return 1 for texts, 2 for pairs, None for columns that were not encoded here."""
        return self._row(0).n_sequences if self.encodings else None

    def convert_to_tensors(self, tensor_type: str | None, prepend_batch_axis: bool = False) -> Self:
        """Turn every column into a tensor ("pt") or array ("np"), in place; None leaves lists.

        Raises: TokenizerError for rows of different lengths, and for another kind of tensor.
        """
        if tensor_type is None:
            return self
        make = _tensor_maker(tensor_type)
        for name, column in self.data.items():
            try:
                self.data[name] = make([column] if prepend_batch_axis else column)
            except (ValueError, TypeError, RuntimeError) as error:
                raise TokenizerError(
                    f"{name!r} does not fit into one tensor: {error}; use padding=True, and "
                    "truncation=True with a max_length, or leave return_tensors out"
                ) from error
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> Self:
        """Move the tensors among the columns to a device, in place."""
        import torch

        for name, column in self.data.items():
            if isinstance(column, torch.Tensor):
                self.data[name] = column.to(device, non_blocking=non_blocking)
        return self

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Return the tokens of a row as the vocabulary spells them."""
        return list(self._row(batch_index).tokens)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Return which text of a pair each token is from: 0, 1, or None."""
        return list(self._row(batch_index).sequence_ids)

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Return the word each token is from: for pre-split input, the index of the given word."""
        return list(self._row(batch_index).word_ids)

    def token_to_sequence(self, batch_or_token: int, token: int | None = None) -> int | None:
        """Return which text of a pair a token is from."""
        row, token = _address(batch_or_token, token)
        return _index(self._row(row).token_to_sequence(token))

    def token_to_word(self, batch_or_token: int, token: int | None = None) -> int | None:
        """Return the word that a token is from."""
        row, token = _address(batch_or_token, token)
        return _index(self._row(row).token_to_word(token))

    def token_to_chars(self, batch_or_token: int, token: int | None = None) -> CharSpan | None:
        """Return the characters of its text that a token stands for."""
        row, token = _address(batch_or_token, token)
        span = self._row(row).token_to_chars(token)
        return CharSpan(*span) if span else None

    def char_to_token(
        self, batch_or_char: int, char: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Return the token that holds a character; None for a space that was trimmed off."""
        row, char = _address(batch_or_char, char)
        return _index(self._row(row).char_to_token(char, sequence_index))

    def char_to_word(
        self, batch_or_char: int, char: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Return the word that holds a character."""
        row, char = _address(batch_or_char, char)
        return _index(self._row(row).char_to_word(char, sequence_index))

    def word_to_tokens(
        self, batch_or_word: int, word: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """Return the tokens of a word; None where truncation cut it away."""
        row, word = _address(batch_or_word, word)
        span = self._row(row).word_to_tokens(word, sequence_index)
        return TokenSpan(*span) if span else None

    def word_to_chars(
        self, batch_or_word: int, word: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """Return the characters of a word in its text."""
        row, word = _address(batch_or_word, word)
        span = self._row(row).word_to_chars(word, sequence_index)
        return CharSpan(*span) if span else None

    def _row(self, index: int) -> Any:
        if self.encodings is None:
            raise TokenizerError(
                "these columns were put together, not encoded: they have no tokens, words or "
                "positions; ask the result of calling the tokenizer"
            )
        return self.encodings[index]


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise TokenizerError for a value that is none of the choices, with the closest one."""
    if value not in choices:
        hint = did_you_mean(str(value), [c for c in choices if isinstance(c, str)])
        raise TokenizerError(f"{name}={value!r} is not known{hint}; choices: {choices}")


def _address(row_or_position: int, position: int | None) -> tuple[int, int]:
    return (0, row_or_position) if position is None else (row_or_position, position)


def _index(found: Any) -> int | None:
    return None if found is None else int(found)


def _tensor_maker(tensor_type: str) -> Callable[[Any], Any]:
    """Return what makes a tensor; of ids also where there are none, which would pass for floats."""
    if tensor_type == "pt":
        import torch

        return lambda column: t if (t := torch.as_tensor(column)).numel() else t.long()
    if tensor_type == "np":
        import numpy as np

        return lambda column: a if (a := np.asarray(column)).size else a.astype(np.int64)
    raise TokenizerError(
        f"return_tensors={tensor_type!r} is not known{did_you_mean(tensor_type, _TENSORS)}; "
        "take 'pt', 'np' or None"
    )
