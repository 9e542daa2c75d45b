"""Ids equal the published tokenizer's; Arrow in, Arrow out; nothing is ever cut."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from longformer_core.errors import TokenizerError
from longformer_core.tokenization import bulk as module
from longformer_core.tokenization.tokenizer import (
    LEDTokenizer,
    LEDTokenizerFast,
    LongformerTokenizer,
    LongformerTokenizerFast,
)
from tests.helpers import corpus_texts, tokenizer_directory, trained_tokenizer_directory

ODD_TEXTS = [
    "",
    " ",
    "\n\n \t x",
    "Hello world",
    " Hello  world's  don't ",
    "naïve café — “quotes” … 1234567 3.14",
    "👩‍👩‍👧‍👦🏳️‍🌈 🤷🏽 emoji",
    "שלום עולם, مرحبا بالعالم ‏RTL‎",
    "\x00\x01\x1b[31m control \x7f\x85 \ufeff bom",
    "日本語のテキスト 中文 한국어",
    "line\u2028separator\u3000ideographic space",
    "a </s> b <s>c<pad><unk>",
    "x" * 3000,
]


@pytest.fixture(scope="module")
def tokenizer() -> LEDTokenizer:
    return LEDTokenizer.from_pretrained(tokenizer_directory())


@pytest.fixture(scope="module")
def saved(tokenizer: LEDTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text('{"model_type": "led"}', encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def published(saved: Path) -> PreTrainedTokenizerBase:
    """What transformers makes of the files that we wrote."""
    return AutoTokenizer.from_pretrained(saved)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """What transformers makes of vocab.json and merges.txt alone."""
    path = tmp_path_factory.mktemp("oracle")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(tokenizer_directory() / name, path / name)
    (path / "config.json").write_text('{"model_type": "led"}', encoding="utf-8")
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_get_the_published_ids(
    tokenizer: LEDTokenizer, oracle: PreTrainedTokenizerBase, text: str
) -> None:
    assert tokenizer.encode(text) == oracle(text).input_ids


def test_real_texts_get_the_published_ids_and_come_back(
    tokenizer: LEDTokenizer, oracle: PreTrainedTokenizerBase
) -> None:
    for text in corpus_texts(6, min_tokens=1500):
        ids = tokenizer.encode(text)
        assert ids == oracle(text).input_ids
        assert len(ids) > 1500
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_gets_the_published_ids(
    tokenizer: LEDTokenizer, oracle: PreTrainedTokenizerBase, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert ids == oracle(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == oracle.decode(
        ids, skip_special_tokens=True
    )


def test_mask_takes_the_space_before_it(
    tokenizer: LEDTokenizer, published: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer.encode("Hello <mask> world")
    before, after = tokenizer.encode("Hello")[:-1], tokenizer.encode(" world")[1:]
    assert ids == [*before, tokenizer.mask_token_id, *after]
    assert published("Hello <mask> world").input_ids == ids


def test_saved_files_are_read_to_equal_ids_by_transformers_and_by_us(
    tokenizer: LEDTokenizer, saved: Path, published: PreTrainedTokenizerBase
) -> None:
    again = LEDTokenizer.from_pretrained(saved)
    (saved / "tokenizer.json").rename(saved / "hidden.json")
    from_parts = LEDTokenizer.from_pretrained(saved)
    (saved / "hidden.json").rename(saved / "tokenizer.json")
    for text in [*ODD_TEXTS, *corpus_texts(2)]:
        ids = tokenizer.encode(text)
        assert published(text).input_ids == again.encode(text) == from_parts.encode(text) == ids
    assert published.mask_token_id == again.mask_token_id == tokenizer.mask_token_id
    assert published.eos_token_id == again.eos_token_id == 2


def test_special_ids_and_size(tokenizer: LEDTokenizer, oracle: PreTrainedTokenizerBase) -> None:
    for role in ("bos", "eos", "pad", "unk", "mask"):
        name = f"{role}_token_id"
        assert getattr(tokenizer, name) == getattr(oracle, name)
    assert len(tokenizer) == len(oracle) == tokenizer.vocab_size
    assert LEDTokenizerFast is LEDTokenizer
    assert LongformerTokenizerFast is LongformerTokenizer


def test_decode_keeps_special_tokens_on_request_and_replaces_broken_bytes(
    tokenizer: LEDTokenizer, oracle: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer.encode("a 👩 b")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>a 👩 b</s>"
    assert tokenizer.batch_decode([ids, []], skip_special_tokens=True) == ["a 👩 b", ""]
    for stop in range(len(ids)):
        assert tokenizer.decode(ids[:stop], skip_special_tokens=True) == oracle.decode(
            ids[:stop], skip_special_tokens=True
        )
    with pytest.raises(TokenizerError, match="-100"):
        tokenizer.decode([0, -100])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("chunked", [False, True])
def test_arrow_lists_hold_the_ids_of_each_row(
    tokenizer: LEDTokenizer, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType, chunked: bool
) -> None:
    # A few hundred bytes a time, so that rows fall into several batches and some exceed one.
    monkeypatch.setattr(module, "_BATCH_BYTES", 300)
    rows = [None, *ODD_TEXTS, None, None, *(t[:1000] for t in corpus_texts(3)), "end"]
    array = pa.array(rows, kind)
    texts = pa.chunked_array([array[:5], array[5:5], array[5:]]) if chunked else array
    ids = tokenizer.encode_arrow(texts)
    ids.validate(full=True)
    assert ids.type == pa.large_list(pa.int32())
    assert ids.to_pylist() == [None if t is None else tokenizer.encode(t) for t in rows]


def test_arrow_follows_the_settings_of_the_tokenizer() -> None:
    tokenizer = LEDTokenizer.from_pretrained(tokenizer_directory(), split_special_tokens=True)
    (ids,) = tokenizer.encode_arrow(pa.array(["a</s>b"])).to_pylist()
    assert ids == tokenizer.encode("a</s>b")
    assert ids.count(tokenizer.eos_token_id) == 1


def test_arrow_slices_and_empty_arrays(tokenizer: LEDTokenizer) -> None:
    texts = pa.array(["a", "b", None, "c"]).slice(1, 2)
    assert tokenizer.encode_arrow(texts).to_pylist() == [tokenizer.encode("b"), None]
    for empty in (pa.array([], pa.string()), pa.chunked_array([], pa.large_string())):
        assert tokenizer.encode_arrow(empty).to_pylist() == []
    assert tokenizer.encode_arrow(pa.nulls(2, pa.string())).to_pylist() == [None, None]


def test_arrow_refuses_other_types_and_broken_bytes(tokenizer: LEDTokenizer) -> None:
    with pytest.raises(TokenizerError, match="int64"):
        tokenizer.encode_arrow(pa.array([1]))
    broken = pa.array([b"ok", b"\xff"]).view(pa.string())
    with pytest.raises(TokenizerError, match="UTF-8"):
        tokenizer.encode_arrow(broken)


def test_half_a_surrogate_pair_is_refused(tokenizer: LEDTokenizer) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("unit", ["many words without an end ", "abcdefghij", "語", " "])
def test_a_very_long_text_is_encoded_whole(tokenizer: LEDTokenizer, unit: str) -> None:
    text = unit * (200_000 // len(unit))
    ids = tokenizer.encode_arrow(pa.array([text]))[0].as_py()
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_stored_limits_are_lifted(tokenizer: LEDTokenizer, saved: Path, tmp_path: Path) -> None:
    backend = Tokenizer.from_file(str(saved / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six"
    assert LEDTokenizer.from_pretrained(tmp_path).encode(text) == tokenizer.encode(text)


def test_prefix_space_of_the_stored_settings_is_kept(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(tokenizer_directory() / name, tmp_path / name)
    stored = json.dumps({"add_prefix_space": True, "tokenizer_class": "LEDTokenizer"})
    (tmp_path / "tokenizer_config.json").write_text(stored, encoding="utf-8")
    ours = LEDTokenizer.from_pretrained(tmp_path)
    assert ours.encode("Hello world") == ours.encode(" Hello world")
    assert (
        ours.encode("Hello world")
        == AutoTokenizer.from_pretrained(tmp_path)("Hello world")["input_ids"]
    )


def test_trained_vocabulary_has_the_published_layout() -> None:
    tokenizer = LEDTokenizer.from_pretrained(trained_tokenizer_directory())
    assert tokenizer.encode("</s><mask>") == [0, 2, len(tokenizer) - 1, 2]
    assert tokenizer.decode(tokenizer.encode("é 👩 text")[1:-1]) == "é 👩 text"


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json, or vocab\.json and merges\.txt"):
        LEDTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(TokenizerError, match="cannot be read"):
        LEDTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    with pytest.raises(TokenizerError, match="no bos_token '<s>'"):
        LEDTokenizer.from_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb c\n", encoding="utf-8")
    with pytest.raises(TokenizerError, match="do not fit together"):
        LEDTokenizer.from_pretrained(tmp_path)


def test_special_tokens_around_raw_ids(tokenizer: LEDTokenizer) -> None:
    build, mask = tokenizer.build_inputs_with_special_tokens, tokenizer.get_special_tokens_mask
    types = tokenizer.create_token_type_ids_from_sequences
    assert build([5, 6]) == [0, 5, 6, 2]
    assert build([5, 6], [7]) == [0, 5, 6, 2, 2, 7, 2]
    assert build([], []) == [0, 2, 2, 2]
    assert mask([5, 6]) == [1, 0, 0, 1]
    assert mask([5, 6], [7]) == [1, 0, 0, 1, 1, 0, 1]
    assert mask([0, 5, 1, 2], already_has_special_tokens=True) == [1, 0, 1, 1]
    with pytest.raises(TokenizerError, match="hold both texts"):
        mask([0], [2], already_has_special_tokens=True)
    assert types([5, 6]) == [0] * 4
    assert types([5, 6], [7]) == [0] * 7
    assert tokenizer.num_special_tokens_to_add() == 2
    assert tokenizer.num_special_tokens_to_add(pair=True) == 4


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_rows_of_columns(tokenizer: LEDTokenizer, side: str) -> None:
    rows = [
        {"input_ids": [0, 9, 8, 2], "global_attention_mask": [1, 0, 0, 0], "labels": 1},
        {"input_ids": [0, 2], "global_attention_mask": [1, 0], "labels": 0},
    ]
    padded = tokenizer.pad(rows, padding_side=side, pad_to_multiple_of=3, return_tensors="pt")
    expected = {
        "input_ids": [[0, 9, 8, 2, 1, 1], [0, 2, 1, 1, 1, 1]],
        "attention_mask": [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]],
        "global_attention_mask": [[1, 0, 0, 0, -1, -1], [1, 0, -1, -1, -1, -1]],
    }
    if side == "left":
        expected = {
            "input_ids": [[1, 1, 0, 9, 8, 2], [1, 1, 1, 1, 0, 2]],
            "attention_mask": [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]],
            "global_attention_mask": [[-1, -1, 1, 0, 0, 0], [-1, -1, -1, -1, 1, 0]],
        }
    assert {name: column.tolist() for name, column in padded.items()} == {
        **expected,
        "labels": [1, 0],
    }
    assert rows[1] == {"input_ids": [0, 2], "global_attention_mask": [1, 0], "labels": 0}


@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_padding_equals_the_reference(
    tokenizer: LEDTokenizer, oracle: PreTrainedTokenizerBase, kind: str | None
) -> None:
    rows = [
        {"input_ids": [0, 9, 2], "token_type_ids": [0] * 3},
        {"input_ids": [2], "token_type_ids": [0]},
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for inputs in (rows, columns, rows[0]):
        for options in ({}, {"padding": "max_length", "max_length": 5}, {"padding": False}):
            if kind is not None and options == {"padding": False} and inputs is not rows[0]:
                continue
            got = tokenizer.pad(inputs, return_tensors=kind, **options)
            expected = oracle.pad(inputs, return_tensors=kind, **options)
            assert got.keys() == expected.keys()
            for name in got:
                assert type(got[name]) is type(expected[name])
                assert listed(got[name]) == listed(expected[name])


def listed(column: Any) -> Any:
    return column.tolist() if hasattr(column, "tolist") else column


def test_padding_answers_in_kind(tokenizer: LEDTokenizer) -> None:
    tensors = [{"input_ids": torch.tensor([0, 5, 2])}, {"input_ids": torch.tensor([0, 2])}]
    assert tokenizer.pad(tensors).input_ids.tolist() == [[0, 5, 2], [0, 2, 1]]
    assert isinstance(tokenizer.pad(tensors).input_ids, torch.Tensor)
    array = tokenizer.pad({"input_ids": np.array([[0, 2]])}, padding="max_length", max_length=3)
    assert isinstance(array.input_ids, np.ndarray)
    assert tokenizer.pad([tokenizer("a"), tokenizer("a b")]).attention_mask[0][-1] == 0
    assert tokenizer.pad({"input_ids": []}).data == {"input_ids": [], "attention_mask": []}
    assert "attention_mask" not in tokenizer.pad({"input_ids": [5]}, return_attention_mask=False)


def test_padding_refuses(tokenizer: LEDTokenizer) -> None:
    with pytest.raises(TokenizerError, match="no input_ids"):
        tokenizer.pad({"ids": [1]})
    with pytest.raises(TokenizerError, match="same columns"):
        tokenizer.pad([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}])
    with pytest.raises(TokenizerError, match="'labels' does not fit"):
        tokenizer.pad(
            [{"input_ids": [1], "labels": [1]}, {"input_ids": [1], "labels": [1, 2]}],
            return_tensors="pt",
        )
    with pytest.raises(TokenizerError, match="did you mean 'longest'"):
        tokenizer.pad({"input_ids": [1]}, padding="longst")
    with pytest.raises(TokenizerError, match="did you mean 'left'"):
        tokenizer.pad({"input_ids": [1]}, padding_side="lft")


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_a_side_that_is_none_is_refused_where_it_is_used(side: str) -> None:
    tokenizer = LEDTokenizer.from_pretrained(tokenizer_directory())
    setattr(tokenizer, side, "rigth")
    with pytest.raises(TokenizerError, match=f"{side}='rigth'.*did you mean 'right'"):
        tokenizer("a b", padding=True, truncation=True, max_length=9)


def test_decoding_takes_what_models_return(tokenizer: LEDTokenizer) -> None:
    rows = tokenizer(["one , two", "three"], padding=True, return_tensors="pt").input_ids
    assert tokenizer.decode(rows, skip_special_tokens=True) == ["one , two", "three"]
    assert tokenizer.batch_decode(rows.numpy(), skip_special_tokens=True) == ["one , two", "three"]
    assert (
        tokenizer.decode(rows[0], skip_special_tokens=True, clean_up_tokenization_spaces=True)
        == "one, two"
    )
    assert tokenizer.decode(2) == "</s>"
    assert tokenizer.decode([]) == ""
    assert tokenizer.batch_decode([0, 2]) == ["<s>", "</s>"]


def test_cleaning_up_joins_what_english_joins(tokenizer: LEDTokenizer) -> None:
    text = "it 's , well . do n't ? yes !"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == "it's, well. don't? yes!"
