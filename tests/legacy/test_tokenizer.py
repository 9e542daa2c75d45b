"""What transformers 5 dropped, compared with the last release of 4: `make test-legacy`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from longformer_core.tokenization.tokenizer import LEDTokenizer, LongformerTokenizer
from tests.helpers import corpus_texts, tokenizer_directory

assert transformers.__version__.startswith("4."), "run by `make test-legacy`, in its environment"

# The classes written in Python, and those over the library that ours is over.
NAMES = ["LEDTokenizer", "LEDTokenizerFast", "LongformerTokenizer", "LongformerTokenizerFast"]
FAST = [name for name in NAMES if name.endswith("Fast")]
TEXTS = ["Hello world", " naïve <mask> café", "👩‍👩‍👧 it's 12 </s>\n\n", "one two three four five"]
PAIRS = ["what?", "why <mask>", "x", "six seven eight nine ten eleven twelve"]
IDS = st.lists(st.integers(4, 1000), max_size=12)


def published(name: str, **options: Any) -> Any:
    return getattr(transformers, name).from_pretrained(tokenizer_directory(), **options)


@pytest.fixture(scope="module")
def ours() -> LEDTokenizer:
    return LEDTokenizer.from_pretrained(tokenizer_directory())


@pytest.fixture(scope="module", params=NAMES)
def theirs(request: pytest.FixtureRequest) -> Any:
    return published(request.param)


@settings(max_examples=50, deadline=None)
@given(first=IDS, second=st.none() | IDS)
def test_special_tokens_around_raw_ids(
    ours: LEDTokenizer, theirs: Any, first: list[int], second: list[int] | None
) -> None:
    for method in (
        "build_inputs_with_special_tokens",
        "create_token_type_ids_from_sequences",
    ):
        assert getattr(ours, method)(first, second) == getattr(theirs, method)(first, second)
    whole = ours.build_inputs_with_special_tokens(first, second)
    options = {"already_has_special_tokens": True}
    assert ours.get_special_tokens_mask(whole, **options) == theirs.get_special_tokens_mask(
        whole, **options
    )


@pytest.mark.parametrize("name", ["LEDTokenizer", "LongformerTokenizer"])
def test_masks_of_raw_ids(ours: LEDTokenizer, name: str) -> None:
    """Only the classes written in Python answer this."""
    theirs = published(name)
    for first, second in (([5, 6], None), ([5, 6], [7]), ([], [])):
        assert ours.get_special_tokens_mask(first, second) == theirs.get_special_tokens_mask(
            first, second
        )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["LEDTokenizer", "LEDTokenizerFast"])
def test_global_masks_are_padded_with_minus_one(name: str, side: str) -> None:
    ours = LEDTokenizer.from_pretrained(tokenizer_directory(), padding_side=side)
    theirs = published(name, padding_side=side)
    rows = [theirs(text) for text in TEXTS]
    for row in rows:
        row["global_attention_mask"] = [1] + [0] * (len(row["input_ids"]) - 1)
    for options in ({}, {"pad_to_multiple_of": 16}, {"padding": "max_length", "max_length": 40}):
        got = ours.pad([dict(row) for row in rows], return_tensors="pt", **options)
        expected = theirs.pad(rows, return_tensors="pt", **options)
        assert got.keys() == expected.keys()
        assert all(got[column].equal(expected[column]) for column in got)
        assert got["global_attention_mask"].min() == -1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "max_length", "max_length": 24, "return_token_type_ids": True},
        # Of an odd number of tokens the two families of classes leave the last to different texts.
        {"truncation": True, "max_length": 8, "return_special_tokens_mask": True},
        {"truncation": "only_second", "max_length": 9},
        {"add_special_tokens": False},
    ],
    ids=str,
)
def test_older_names(ours: LEDTokenizer, theirs: Any, options: dict[str, Any]) -> None:
    one = {"text": "a b c", "text_pair": PAIRS[3], **options}
    assert ours.encode_plus(**one).data == theirs.encode_plus(**one).data
    assert ours.encode(**one) == theirs.encode(**one)
    rows = list(zip(TEXTS, PAIRS, strict=True))
    if options.get("truncation") != "only_second":
        got, expected = (t.batch_encode_plus(rows, **options) for t in (ours, theirs))
        assert got.data == expected.data
    got, expected = (t.batch_encode_plus(TEXTS) for t in (ours, theirs))
    assert got.data == expected.data


@pytest.mark.parametrize("name", NAMES)
def test_pre_split_words(name: str) -> None:
    words = [["Hello", "wonderful", "world"], ["naïve", "café"], ["it's", "10", "👩‍👩‍👧"]]
    ours = LEDTokenizer.from_pretrained(tokenizer_directory(), add_prefix_space=True)
    theirs = published(name, add_prefix_space=True)
    got, expected = (t(words, is_split_into_words=True, padding=True) for t in (ours, theirs))
    assert got.data == expected.data
    if name in FAST:
        assert [got.word_ids(i) for i in range(3)] == [expected.word_ids(i) for i in range(3)]


def test_a_prefix_space_for_one_call(ours: LEDTokenizer) -> None:
    theirs = published("LEDTokenizer")
    for text in ("Hello world", " Hello", ""):
        assert ours.encode(text, add_prefix_space=True) == theirs.encode(
            text, add_prefix_space=True
        )


@pytest.mark.parametrize("name", FAST)
def test_windows_of_real_texts(ours: LEDTokenizer, name: str) -> None:
    """Ids, masks, offsets, and the row of each window."""
    theirs = published(name)
    texts = corpus_texts(3, min_tokens=1500)
    options = {
        "truncation": "only_second",
        "max_length": 512,
        "stride": 64,
        "padding": True,
        "return_overflowing_tokens": True,
        "return_offsets_mapping": True,
    }
    questions = ["What is it about?"] * len(texts)
    assert ours(questions, texts, **options).data == theirs(questions, texts, **options).data
    assert ours(texts, return_offsets_mapping=True).data == (
        theirs(texts, return_offsets_mapping=True).data
    )


def test_real_texts(ours: LEDTokenizer, theirs: Any) -> None:
    """The mask, too, takes the space before it in every class of release 4."""
    for text in [*TEXTS, *(text[:20_000] for text in corpus_texts(3, min_tokens=1500))]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, spaces_between_special_tokens=False)
    cleaned = {"skip_special_tokens": True, "clean_up_tokenization_spaces": True}
    ids = ours.encode("it 's , well . do n't ? yes ! a ' b we 're I 've I 'm")
    assert ours.decode(ids, **cleaned) == theirs.decode(ids, **cleaned)


@pytest.mark.parametrize("name", NAMES)
def test_saved_files_are_read_to_equal_ids(name: str, tmp_path: Path) -> None:
    """Ours by release 4, with added tokens; and those of release 4 by ours."""
    ours = LongformerTokenizer.from_pretrained(tokenizer_directory())
    ours.add_tokens(["longformerish"])
    ours.add_special_tokens({"additional_special_tokens": ["[q]", "[/q]"]})
    text = "a longformerish [q] why <mask> [/q] x"
    ids = ours.encode(text)
    ours.save_pretrained(tmp_path / "ours")
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "ours")
    assert theirs.encode(text) == ids
    assert set(theirs.all_special_tokens) == set(ours.all_special_tokens)
    theirs.save_pretrained(tmp_path / "theirs")
    assert LongformerTokenizer.from_pretrained(tmp_path / "theirs").encode(text) == ids
    if name in FAST:
        shutil.copytree(tmp_path / "theirs", tmp_path / "parts")
        (tmp_path / "parts" / "tokenizer.json").unlink()
        assert LongformerTokenizer.from_pretrained(tmp_path / "parts").encode(text) == ids
