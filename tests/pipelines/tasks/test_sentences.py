"""Sentences by rules: where they begin and end, and which are prose."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.tasks.sentences import is_prose, sentence_spans


def sentences(text: str) -> list[str]:
    return [text[begin:end] for begin, end in sentence_spans(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Who left. He ran.", ["Dr. Who left.", "He ran."]),
        ("It costs 3.50, see e.g. J. Doe. Yes!", ["It costs 3.50, see e.g. J. Doe.", "Yes!"]),
        ('"Go." She went.', ['"Go."', "She went."]),
        ("A heading\n\nA line\nand more.", ["A heading", "A line\nand more."]),
        ("Take:\n- one\n- two", ["Take:", "- one", "- two"]),
        ("一つ。二つ。", ["一つ。", "二つ。"]),
        ("She came, etc. and left. 1. One.", ["She came, etc. and left.", "1. One."]),
        ("\r\n \t\r\n", []),
        ("", []),
    ],
)
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@given(st.text(alphabet=st.sampled_from("aB1 .!?\n\r\t-*\U0001f600e\u0301。)\"'"), max_size=200))
def test_spans_hold_every_visible_character_once_and_in_order(text: str) -> None:
    end = 0
    for begin, stop in sentence_spans(text):
        assert end <= begin < stop
        assert text[begin:stop] == text[begin:stop].strip()
        assert not text[end:begin].strip()
        end = stop
    assert not text[end:].strip()


@pytest.mark.parametrize(
    "sentence",
    [
        "This proposal lets a function take its arguments by name.",
        "The ``with`` statement closes the file, even after an error.",
        "Why would anybody want to do that?",
    ],
)
def test_prose(sentence: str) -> None:
    assert is_prose(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "Motivation",
        "A heading of more than five words",
        "def take(self, one, two, three): return one.",
        ">>> print(one and two and three).",
        "| one | two | three | four | five |.",
        "==== ==== ==== ==== ==== ====.",
        "1 2 3 4 5 6 7 8 9 10.",
        "Too short, this.",
        "word " * 61 + ".",
        ".. note: this is a directive of the markup.",
    ],
)
def test_no_prose(sentence: str) -> None:
    assert not is_prose(sentence)
