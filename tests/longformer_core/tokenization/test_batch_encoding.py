"""The answer of a call: by key and by name, as tensors, and from characters to tokens and back."""

import copy
import pickle

import numpy as np
import pytest
import torch

from longformer_core.errors import TokenizerError
from longformer_core.tokenization.batch_encoding import (
    BatchEncoding,
    CharSpan,
    EncodeOptions,
    TokenSpan,
)
from longformer_core.tokenization.tokenizer import LEDTokenizer
from tests.helpers import tokenizer_directory

TEXT = "Long documents are long"
PAIR = "short ones too"


@pytest.fixture(scope="module")
def tokenizer() -> LEDTokenizer:
    return LEDTokenizer.from_pretrained(tokenizer_directory())


@pytest.fixture(scope="module")
def encoded(tokenizer: LEDTokenizer) -> BatchEncoding:
    return tokenizer([TEXT, "x"], [PAIR, "y"], padding=True, return_offsets_mapping=True)


def test_columns_by_key_and_by_name(encoded: BatchEncoding) -> None:
    assert encoded.input_ids is encoded["input_ids"]
    assert "attention_mask" in encoded
    assert list(encoded) == ["input_ids", "attention_mask", "offset_mapping"]
    assert dict(**encoded) == encoded.data
    assert encoded[:1]["input_ids"] == encoded.input_ids[:1]
    assert encoded[1].ids == encoded.input_ids[1]
    assert encoded.n_sequences == 2
    with pytest.raises(AttributeError, match="did you mean 'input_ids'"):
        _ = encoded.inputs_ids
    with pytest.raises(KeyError):
        encoded["labels"]


def test_every_letter_finds_its_token_and_back(encoded: BatchEncoding) -> None:
    for sequence, text in enumerate([TEXT, PAIR]):
        for position, letter in enumerate(text):
            token = encoded.char_to_token(0, position, sequence_index=sequence)
            word = encoded.char_to_word(0, position, sequence_index=sequence)
            if letter == " ":
                assert token is None
                continue
            assert token is not None
            assert word is not None
            start, end = encoded.offset_mapping[0][token]
            assert start <= position < end
            assert encoded.token_to_chars(0, token) == CharSpan(start, end)
            assert encoded.token_to_sequence(0, token) == sequence
            assert encoded.sequence_ids(0)[token] == sequence
            assert encoded.token_to_word(0, token) == word == encoded.word_ids(0)[token]
            span = encoded.word_to_tokens(0, word, sequence_index=sequence)
            assert isinstance(span, TokenSpan)
            assert span.start <= token < span.end
            chars = encoded.word_to_chars(0, word, sequence_index=sequence)
            assert chars is not None
            assert text[chars.start : chars.end].split() == [text[slice(*chars)].strip()]


def test_positions_alone_are_of_the_first_row(encoded: BatchEncoding) -> None:
    assert encoded.char_to_token(0) == encoded.char_to_token(0, 0) == 1
    assert encoded.token_to_word(1) == 0
    assert encoded.token_to_chars(0) is None
    assert encoded.word_to_tokens(999) is None
    assert encoded.word_ids()[0] is None
    assert encoded.tokens()[0] == "<s>"


def test_positions_count_padding_on_the_left(tokenizer: LEDTokenizer) -> None:
    encoded = tokenizer("ab", padding="max_length", max_length=12, padding_side="left")
    token = encoded.char_to_token(0)
    assert token is not None
    assert encoded.input_ids[token] == tokenizer.encode("ab")[1]
    assert len(encoded.word_ids()) == 12


def test_tensors_and_devices(tokenizer: LEDTokenizer) -> None:
    lists = tokenizer(["a b", "c"], padding=True)
    arrays = copy.deepcopy(lists).convert_to_tensors("np")
    assert isinstance(arrays.input_ids, np.ndarray)
    assert arrays.input_ids.dtype == np.int64
    tensors = copy.deepcopy(lists).convert_to_tensors("pt")
    assert tensors.input_ids.tolist() == lists.input_ids == arrays.input_ids.tolist()
    assert tensors.input_ids.dtype == torch.int64
    tensors["note"] = "kept"
    assert tensors.to("meta") is tensors
    assert tensors.attention_mask.device.type == "meta"
    assert tensors.note == "kept"
    one = BatchEncoding({"input_ids": [1, 2]}).convert_to_tensors("pt", prepend_batch_axis=True)
    assert one.input_ids.shape == (1, 2)
    assert BatchEncoding({"labels": [0.5]}, tensor_type="pt").labels.dtype == torch.float32


def test_it_travels_between_processes(encoded: BatchEncoding) -> None:
    again = pickle.loads(pickle.dumps(encoded))
    assert again.data == encoded.data
    assert again.word_ids(0) == encoded.word_ids(0)


def test_columns_put_together_have_no_positions(encoded: BatchEncoding) -> None:
    made = BatchEncoding({"input_ids": [[1, 2]]})
    assert [made.is_fast, encoded.is_fast, made.n_sequences] == [False, True, None]
    with pytest.raises(TokenizerError, match="put together, not encoded"):
        made.word_ids(0)


def test_options_name_the_closest() -> None:
    with pytest.raises(TokenizerError, match="did you mean 'return_tensors'"):
        EncodeOptions.of({"return_tensor": "pt"})
