"""A call gives what the published tokenizer gives: every column, window and position of it."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import LEDTokenizer as PublishedTokenizer

from longformer_core.errors import TokenizerError
from longformer_core.tokenization.tokenizer import LEDTokenizer, LongformerTokenizerFast
from tests.helpers import all_texts, corpus_texts, tokenizer_directory

TEXTS = [
    "Hello world",
    " naïve <mask> café",
    "",
    "👩‍👩‍👧 it's 1234 </s>\n\n",
    "one two three four five",
]
PAIRS = ["what?", "why <mask>", "x", "שלום עולם", "six seven eight nine ten eleven twelve"]
PIECES = [
    "Hello",
    " world",
    " the",
    " naïve",
    "👩‍👩‍👧",
    "\n\n",
    " <mask>",
    "</s>",
    " 日本",
    "  ",
    "ab" * 9,
    " it's",
]


def ours_and_published(**settings: Any) -> tuple[LEDTokenizer, PublishedTokenizer]:
    """Read vocab.json and merges.txt by both. Left alone, the reference's mask keeps its space."""
    vocab, merges = (str(tokenizer_directory() / name) for name in ("vocab.json", "merges.txt"))
    mask = AddedToken("<mask>", lstrip=True, normalized=False, special=True)
    published = PublishedTokenizer(vocab=vocab, merges=merges, mask_token=mask, **settings)
    return LEDTokenizer(vocab, merges, **settings), published


@pytest.fixture(scope="module")
def both() -> tuple[LEDTokenizer, PublishedTokenizer]:
    return ours_and_published()


@pytest.fixture(scope="module")
def tokenizer(both: tuple[LEDTokenizer, PublishedTokenizer]) -> LEDTokenizer:
    return both[0]


def assert_same(got: Any, expected: Any) -> None:
    """Compare the columns, and what each row knows of its tokens."""
    assert got.keys() == expected.keys()
    for name in got:
        assert type(got[name]) is type(expected[name])
        assert plain(got[name]) == plain(expected[name]), name
    assert len(got.encodings) == len(expected.encodings)
    for row in range(len(got.encodings)):
        for view in ("tokens", "word_ids", "sequence_ids"):
            assert getattr(got, view)(row) == getattr(expected, view)(row)


def plain(column: Any) -> Any:
    return column.tolist() if hasattr(column, "tolist") else column


CALLS: list[dict[str, Any]] = [
    {"text": TEXTS[0]},
    {"text": TEXTS[0], "text_pair": PAIRS[0]},
    {"text": TEXTS},
    {"text": TEXTS, "text_pair": PAIRS},
    {"text": list(zip(TEXTS, PAIRS, strict=True))},
    {"text": TEXTS, "padding": True, "return_tensors": "pt"},
    {"text": TEXTS, "padding": "longest", "padding_side": "left", "return_tensors": "np"},
    {"text": TEXTS, "padding": True, "pad_to_multiple_of": 16, "return_special_tokens_mask": True},
    {"text": TEXTS, "padding": "max_length", "max_length": 9, "return_token_type_ids": True},
    {"text": TEXTS, "padding": "max_length", "max_length": 9, "truncation": True},
    {"text": TEXTS, "max_length": 5, "return_length": True},
    {"text": TEXTS[4], "max_length": 5, "return_offsets_mapping": True, "return_length": True},
    {"text": TEXTS[4], "return_tensors": "pt", "return_attention_mask": False},
    {"text": TEXTS, "text_pair": PAIRS, "truncation": "longest_first", "max_length": 8},
    {"text": "why?", "text_pair": PAIRS[4], "truncation": "only_second", "max_length": 10},
    {"text": PAIRS[4], "text_pair": "why?", "truncation": "only_first", "max_length": 10},
    {"text": TEXTS, "truncation": "do_not_truncate", "max_length": 3},
    {"text": TEXTS, "add_special_tokens": False, "return_special_tokens_mask": True},
    {"text": TEXTS, "split_special_tokens": True},
    {"text": TEXTS[4], "text_target": TEXTS[0], "padding": "max_length", "max_length": 9},
    {"text_target": TEXTS, "text_pair_target": PAIRS, "padding": True},
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_calls(both: tuple[LEDTokenizer, PublishedTokenizer], call: dict[str, Any]) -> None:
    ours, published = both
    assert_same(ours(**call), published(**call))


@pytest.mark.parametrize("every", [60, pytest.param(1, marks=pytest.mark.slow)])
def test_validation_texts(both: tuple[LEDTokenizer, PublishedTokenizer], every: int) -> None:
    """Whole, and in windows beside a question: ids, masks, offsets and the row of each window."""
    ours, published = both
    windows: dict[str, Any] = {
        "truncation": "only_second",
        "max_length": 1024,
        "stride": 128,
        "return_overflowing_tokens": True,
        "padding": True,
        "return_tensors": "np",
    }
    texts = all_texts()[::every]
    for start in range(0, len(texts), 8):
        some = list(texts[start : start + 8])
        questions = [f"What follows {text[:20]!r}?" for text in some]
        got, expected = (
            t(questions, some, return_offsets_mapping=True, **windows) for t in (ours, published)
        )
        assert got.keys() == expected.keys()
        assert all(np.array_equal(got[name], expected[name]) for name in got)
        assert len(got["overflow_to_sample_mapping"]) > len(some)
        whole, published_whole = (t(some, return_offsets_mapping=True) for t in (ours, published))
        assert whole.data == published_whole.data
        assert ours.batch_decode([ids[1:-1] for ids in whole["input_ids"]]) == some


TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=30
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "padding": st.sampled_from([False, True, "max_length"]),
        "truncation": st.sampled_from([None, False, True, "only_first", "only_second"]),
        "max_length": st.sampled_from([6, 8, 12, 16]),
        "stride": st.sampled_from([1, 3]),
        "pad_to_multiple_of": st.just(4),
        "padding_side": st.sampled_from(["left", "right"]),
        "return_overflowing_tokens": st.booleans(),
        "return_offsets_mapping": st.booleans(),
        "return_special_tokens_mask": st.booleans(),
        "add_special_tokens": st.booleans(),
        "split_special_tokens": st.booleans(),
    },
)


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BaseException as error:
        # The reference lets the library's panic through, which is below Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return error


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
    is_pair=st.booleans(),
    options=OPTIONS,
)
def test_any_unicode_with_any_options(
    rows: list[tuple[str, str]], is_pair: bool, options: dict[str, Any]
) -> None:
    texts = [a for a, _ in rows]
    pairs = [b for _, b in rows] if is_pair else None
    ours, published = ANY
    got = outcome(lambda: ours(texts, pairs, **options))
    # The reference warns, here an error, of a max_length that padding leaves without effect.
    expected = outcome(lambda: published(texts, pairs, verbose=False, **options))
    if "lower stride" in str(got):
        # Refused for any text; the reference fails when it meets one that has to be cut.
        assert options["stride"] >= options["max_length"] - (4 if is_pair else 2)
    elif isinstance(expected, BaseException):
        assert isinstance(got, TokenizerError)
    else:
        assert_same(got, expected)
        whole = ours(texts, split_special_tokens=True)["input_ids"]
        assert [ours.decode(ids[1:-1]) for ids in whole] == texts


ANY = ours_and_published()


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_settings_of_the_tokenizer(side: str, trim_offsets: bool) -> None:
    ours, published = ours_and_published(
        padding_side=side,
        truncation_side=side,
        trim_offsets=trim_offsets,
        add_prefix_space=True,
        model_max_length=7,
    )
    windows = {"stride": 2, "return_overflowing_tokens": True, "return_offsets_mapping": True}
    for options in ({"padding": True, "truncation": True, **windows}, {"padding": "max_length"}):
        assert_same(ours(TEXTS, **options), published(TEXTS, **options))


def test_words() -> None:
    """Pre-split words are tokenized as the reference does where it is told of the space."""
    ours, published = ours_and_published(add_prefix_space=True)
    words = [["Hello", "wonderful", "world"], ["naïve", "<mask>"], [], ["it's", "10", "👩‍👩‍👧"]]
    options = {"is_split_into_words": True, "return_offsets_mapping": True}
    assert_same(ours(words, **options), published(words, **options))
    assert_same(ours(words[0], **options), published(words[0], **options))
    pairs = {"text": words[0], "text_pair": words[3], "max_length": 9, **options}
    assert_same(ours(**pairs), published(**pairs))
    assert ours(words[0], **options).word_ids()[1] == 0


def test_words_need_the_space_between_them(tokenizer: LEDTokenizer) -> None:
    words = ["some", "wonderful", "words"]
    with pytest.raises(TokenizerError, match="add_prefix_space=True"):
        tokenizer(words, is_split_into_words=True)
    ids = tokenizer(words, is_split_into_words=True, add_prefix_space=True)["input_ids"]
    assert ids == tokenizer.encode(" some wonderful words")
    assert tokenizer.encode("some wonderful words", add_prefix_space=True) == ids
    assert not tokenizer.add_prefix_space


def test_a_pair_with_an_empty_text_is_a_pair_alone_as_in_a_batch(tokenizer: LEDTokenizer) -> None:
    """The reference forgets the empty text of a single pair, and not that of a batch."""
    assert tokenizer("a", "")["input_ids"] == tokenizer(["a"], [""])["input_ids"][0]


def test_older_names_and_ids_alone(tokenizer: LEDTokenizer) -> None:
    called = tokenizer("a b", "c", max_length=9, padding="max_length")
    assert tokenizer.encode_plus("a b", "c", max_length=9, padding="max_length") == called
    assert tokenizer.encode("a b", "c", max_length=9, padding="max_length") == called["input_ids"]
    rows = [("a b", "c"), ("d", "e f")]
    batch = tokenizer(["a b", "d"], ["c", "e f"], padding=True)
    assert tokenizer.batch_encode_plus(rows, padding=True) == batch
    assert tokenizer.batch_encode_plus(["a", "b"]) == tokenizer(["a", "b"])
    assert tokenizer.encode("a", return_tensors="pt").shape == (1, 3)
    assert tokenizer.tokenize("a the") == ["a", "Ġthe"]
    assert tokenizer.tokenize("a", "b", add_special_tokens=True)[-2:] == ["b", "</s>"]


def test_an_empty_batch_has_empty_columns(tokenizer: LEDTokenizer) -> None:
    assert tokenizer([]).data == {"input_ids": [], "attention_mask": []}
    assert tokenizer([], padding=True, return_tensors="pt").input_ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "a", "max_lenght": 3}, "'max_lenght' .did you mean 'max_length'"),
        ({"text": "a", "padding": "maxlength"}, "did you mean 'max_length'"),
        ({"text": "a", "truncation": "only_frist"}, "did you mean 'only_first'"),
        ({"text": "a", "padding_side": "lft"}, "did you mean 'left'"),
        ({"text": "a", "return_tensors": "tf"}, "'pt', 'np' or None"),
        ({"text": "a", "stride": -1}, "stride is -1"),
        ({"text": "a", "pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        ({"text": "a", "max_length": 1}, "has room for -1 tokens"),
        ({"text": "a b c", "max_length": 4, "stride": 2}, "stride is 2"),
        ({"text": "a", "truncation": True, "max_length": 9, "padding": True}, None),
        (
            {
                "text": "a",
                "truncation": True,
                "max_length": 9,
                "padding": True,
                "pad_to_multiple_of": 8,
            },
            "multiple of 8",
        ),
        (
            {
                "text": "a b c",
                "text_pair": "d e f g",
                "truncation": "only_second",
                "max_length": 9,
                "stride": 4,
            },
            "no room beside the text",
        ),
        (
            {"text": "a", "text_pair": "b c d e", "truncation": "only_first", "max_length": 6},
            "no room beside the text",
        ),
        ({"text": ["a", "b c"], "return_tensors": "pt"}, "use padding=True"),
        ({"text": ["a", "b c"], "return_tensors": "np"}, "use padding=True"),
        ({}, "nothing to encode"),
        ({"text": ["a", None]}, "row 1 holds NoneType"),
        ({"text": 3}, "row 0 holds int"),
        ({"text": ["a", "b\ud800"]}, "row 1 .*surrogate"),
        ({"text": [["a", "b", "c"]]}, "is_split_into_words"),
        ({"text": ["a"], "text_pair": "b"}, "as many text_pair, not one text"),
        ({"text": ["a"], "text_pair": ["b", "c"]}, "not 2 texts"),
    ],
    ids=str,
)
def test_refusals(tokenizer: LEDTokenizer, call: dict[str, Any], message: str | None) -> None:
    if message is None:
        tokenizer(**call)
    else:
        with pytest.raises(TokenizerError, match=message):
            tokenizer(**call)


def test_a_text_beyond_the_model_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    ours, _ = ours_and_published(model_max_length=5)
    ours("one two three four five", verbose=False)
    ours("one two three four five", max_length=5)
    assert not caplog.records
    for _ in range(2):
        ours(["one", "one two three four five"])
    (record,) = caplog.records
    assert "longer than the 5 tokens of the model" in record.getMessage()


def test_a_limit_that_nobody_gave_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, _ = ours_and_published()
    whole = tokenizer("one two three")
    for _ in range(2):
        assert tokenizer("one two three", truncation=True, padding="max_length") == whole
    assert len(caplog.records) == 2
    assert ["no truncation" in caplog.text, "no padding" in caplog.text] == [True, True]


def test_calls_from_many_threads_do_not_disturb_each_other(tokenizer: LEDTokenizer) -> None:
    """Limits belong to a call: set on the shared object they would cut another thread's text."""
    text = corpus_texts(1, min_tokens=500)[0][:4000]
    whole = tokenizer(text)["input_ids"]

    def length(limit: int) -> int:
        return len(tokenizer(text, max_length=limit or None)["input_ids"])

    limits = [0, 8, 64, 0, 128] * 20
    with ThreadPoolExecutor(4) as pool:
        lengths = list(pool.map(length, limits))
    assert lengths == [limit or len(whole) for limit in limits]


def test_encoding_lets_other_threads_run(tokenizer: LEDTokenizer) -> None:
    texts = corpus_texts(4, min_tokens=1500) * 4
    ticks, finished = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not finished.wait(0.001):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    during = ticks
    finished.set()
    ticker.join()
    assert len(encodings) == len(texts)
    assert during > 10


def test_longformer_and_led_give_equal_results() -> None:
    longformer = LongformerTokenizerFast.from_pretrained(tokenizer_directory())
    led = LEDTokenizer.from_pretrained(tokenizer_directory())
    assert longformer(TEXTS, PAIRS, padding=True) == led(TEXTS, PAIRS, padding=True)
