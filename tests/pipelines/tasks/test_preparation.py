"""Texts to windows: every token in its place, every row accounted for."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longformer_core.tokenization.tokenizer import LEDTokenizerFast
from pipelines.rows import InputColumn
from pipelines.tasks.preparation import (
    PREPARED,
    WINDOW,
    Frame,
    Window,
    cut,
    documents_of,
    single_frame,
    spans,
    tokenizer_of,
)
from pipelines.tasks.summarize import Summarize, SummarizeOptions
from tests.helpers import corpus_texts
from tests.pipelines.asking import kinds, prepare
from tests.pipelines.parquet import invalid_utf8

KNOWN = ("num_windows", "truncated", "coverage")


@functools.cache
def task_of(directory: Path, **options: Any) -> Summarize:
    settings = {"model": str(directory), "max_source_tokens": 64} | options
    return Summarize.from_options(SummarizeOptions(**settings), device="cpu")


def input_ids(block: pa.Table) -> list[list[list[int]] | None]:
    """Return the token ids of every window of every row, None for a row without."""
    rows = block.column("__windows").to_pylist()
    return [None if row is None else [window["input_ids"] for window in row] for row in rows]


# --- cutting ---


@given(st.integers(0, 300), st.integers(1, 40), st.integers(0, 39))
def test_spans_cover_everything_and_overlap_by_the_stride(
    num_tokens: int, room: int, stride: int
) -> None:
    stride = min(stride, room - 1)
    found = list(spans(num_tokens, room, stride))
    assert found[0][0] == 0
    for (start, size), (after, _) in itertools.pairwise(found):
        assert size == room, "only the last may be shorter"
        assert start + size - after == stride
        assert start + size < num_tokens, "the one after it sees nothing new"
    start, size = found[-1]
    assert start + size == num_tokens
    assert size <= room


@given(
    st.integers(0, 60),
    st.integers(3, 30),
    st.integers(0, 27),
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 4), st.integers(0, 4)),
        min_size=1,
        max_size=3,
    ),
)
@settings(deadline=None)
def test_windows_hold_their_piece_and_repeat_their_frame(
    led_directory: Path,
    num_tokens: int,
    limit: int,
    stride: int,
    given_frames: list[tuple[int, int, int, int]],
) -> None:
    task = dataclasses.replace(
        task_of(led_directory, on_long="windows"), window_tokens=limit, stride_tokens=stride
    )
    frames = [
        Frame((7,) * b, (8, 9, 8, 9, 8)[:a], min(gb, b), min(ga, a), part)
        for part, (b, a, gb, ga) in enumerate(given_frames)
    ]
    ids = np.arange(100, 100 + num_tokens, dtype=np.int64)
    windows, error = cut(task, ids, frames)
    room = limit - max(frame.num_tokens for frame in frames)
    if num_tokens > room <= stride:
        assert windows == []
        assert error is not None
        assert (error["stage"], error["type"]) == ("tokenize", "TooLong")
        assert f"leaves {max(room, 0)} of window_tokens {limit}" in error["message"]
        return
    assert error is None
    for part, frame in enumerate(frames):
        mine = [window for window in windows if window.part == part]
        assert [(w.start, w.size) for w in mine] == list(spans(num_tokens, room, stride))
        for window in mine:
            piece = ids[window.start : window.start + window.size].tolist()
            assert window.input_ids.tolist() == [*frame.before, *piece, *frame.after]
            assert window.input_ids.dtype == np.int32
            assert window.input_ids[window.first :][: window.size].tolist() == piece
            length = len(window.input_ids)
            assert length <= max(limit, frame.num_tokens)
            head, tail = range(frame.global_before), range(length - frame.global_after, length)
            assert window.global_positions == (*head, *tail)
    # The frames of one piece stand together: a worker's requests are in the windows' order.
    assert [w.part for w in windows] == [*range(len(frames))] * (len(windows) // len(frames))


def test_global_positions_are_ascending_and_once_each() -> None:
    whole = Window.of(np.arange(2), Frame((1, 1), (1, 1), 2, 2), 0, 2)
    assert whole.global_positions == (0, 1, 4, 5)
    both = Window.of(np.arange(0), Frame((1,), (1,), 2, 2), 0, 0)
    assert both.global_positions == (0, 1)


def test_a_limit_that_the_frame_fills(led_directory: Path) -> None:
    """A document is never given half a frame, and never read for ever."""
    frame = [Frame((5,) * 6, (6,) * 3)]
    for on_long, stride, name in (("windows", 2, "window_tokens"), ("truncate", 0, "max_source")):
        for limit in (3, 9, 9 + stride):
            task = dataclasses.replace(
                task_of(led_directory, on_long=on_long),
                max_source_tokens=limit,
                window_tokens=limit,
                stride_tokens=stride,
            )
            windows, error = cut(task, np.arange(50), frame)
            assert windows == []
            assert error is not None
            assert error["type"] == "TooLong"
            assert error["message"].startswith("9 tokens stand around each piece")
            assert name in error["message"]
        task = dataclasses.replace(task, max_source_tokens=limit + 1, window_tokens=limit + 1)
        windows, error = cut(task, np.arange(50), frame)
        assert error is None
        assert windows[0].size == 1 + stride


# --- whole blocks ---


def test_whole_documents_are_encoded_as_the_tokenizer_does(led_directory: Path) -> None:
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    texts = [text[:150] for text in corpus_texts(5)]
    block = prepare(task_of(led_directory, max_source_tokens=512), texts)
    assert block.schema == PREPARED
    assert input_ids(block) == [[tokenizer.encode(t)] for t in texts]
    assert block.column("num_tokens_in").to_pylist() == [len(tokenizer.encode(t)) for t in texts]
    assert block.column("num_windows").to_pylist() == [1] * 5
    assert block.column("truncated").to_pylist() == [False] * 5
    assert block.column("coverage").to_pylist() == [1.0] * 5
    assert kinds(block) == [None] * 5
    assert block.column("__text").null_count == 5, "nobody reads it"
    for row in block.column("__windows").to_pylist():
        (window,) = row
        assert window["global_positions"] == [0]
        assert (window["start"], window["first"], window["part"]) == (0, 1, 0)


def test_text_that_is_not_there(led_directory: Path) -> None:
    blanks = ["", " ", "\n\t \r\n", "\u00a0\u3000", "\x0b\x0c"]
    block = prepare(task_of(led_directory), [None, *blanks, "there"])
    assert kinds(block) == ["NullText", *["EmptyText"] * len(blanks), None]
    assert all(e["stage"] == "read" for e in block.column("error").to_pylist() if e)
    for column in ("__windows", "num_tokens_in", *KNOWN):
        assert block.column(column).is_null().to_pylist() == [True] * 6 + [False]


def test_strange_text_is_good_text(led_directory: Path) -> None:
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    strange = {
        "control": "a\x00b\x01\x07\x1b[31m\x7f",
        "only control": "\x00\x01",
        "emoji": "👩‍👩‍👧‍👦 family 🇪🇺 \U0001f9ff",
        "right to left": "שלום עולם \u202eabc\u202c مرحبا بالعالم",
        "combining": "e\u0301" * 20,
        "zero width": "\u200b\ufeff",
        "special": "</s> <s> <pad> <mask> <unk>",
        "astral": "\U0010ffff\ue000\ufffe",
    }
    block = prepare(task_of(led_directory, max_source_tokens=512), list(strange.values()))
    assert dict(zip(strange, kinds(block), strict=True)) == dict.fromkeys(strange)
    assert input_ids(block) == [[tokenizer.encode(t)] for t in strange.values()]


def test_bytes_that_are_not_utf8_fail_their_row_only(led_directory: Path) -> None:
    broken = [b"\xff\xfe", b"cut \xe2\x82", b"surrogate \xed\xa0\x80", b"latin caf\xe9"]
    task = task_of(led_directory)
    block = prepare(task, invalid_utf8([b"before", *broken, None, b"  ", b"after"]))
    assert kinds(block) == [None, *["ReadError"] * 4, "NullText", "EmptyText", None]
    errors = block.column("error").to_pylist()
    assert all("UTF-8" in error["message"] for error in errors[1:5])
    alone = input_ids(prepare(task, ["before", "after"]))
    assert [ids for ids in input_ids(block) if ids] == alone


@pytest.mark.parametrize("rows", [[], [None], [""], [None, None]])
def test_blocks_without_a_single_text(led_directory: Path, rows: list[str | None]) -> None:
    block = prepare(task_of(led_directory), rows)
    assert block.schema == PREPARED
    assert block.num_rows == len(rows)
    assert block.column("__windows").null_count == len(rows)
    assert block.column("error").null_count == 0


def test_slices_and_chunks_are_read_from_their_own_place(led_directory: Path) -> None:
    task = task_of(led_directory)
    whole = pa.array([*[t[:90] for t in corpus_texts(6)], None, ""], pa.large_string())
    expected = prepare(task, whole)
    chunks = pa.chunked_array([whole[:1], whole[1:1], whole[1:5], whole[5:]])
    assert prepare(task, chunks).equals(expected)
    assert prepare(task, whole[3:]).equals(expected.slice(3))


def test_a_cut_keeps_the_end_token_and_says_so(led_directory: Path) -> None:
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    text = corpus_texts(1, 500)[0]
    ids = tokenizer.encode(text)
    block = prepare(task_of(led_directory, max_source_tokens=40), [text, "short"])
    assert input_ids(block)[0] == [[*ids[:39], 2]]
    assert block.column("num_tokens_in").to_pylist()[0] == len(ids)
    assert block.column("truncated").to_pylist() == [True, False]
    assert block.column("coverage").to_pylist() == [38 / (len(ids) - 2), 1.0]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.none() | st.integers(0, 30), max_size=12),
    limit=st.integers(4, 24),
    on_long=st.sampled_from(["truncate", "windows", "error"]),
)
def test_counts_of_any_block(
    led_directory: Path, rows: list[int | None], limit: int, on_long: str
) -> None:
    # "a" is one token and so is every " a": the number of tokens is known beforehand.
    texts = [None if n is None else " ".join(["a"] * n) for n in rows]
    options = {"on_long": on_long, "max_source_tokens": limit}
    if on_long == "windows":
        options["stride_tokens"] = 1
    block = prepare(task_of(led_directory, **options), texts).to_pylist()
    room = limit - 2
    for row, n in zip(block, rows, strict=True):
        kind = row["error"] and row["error"]["type"]
        if not n or (n > room and on_long == "error"):
            assert kind == {None: "NullText", 0: "EmptyText"}.get(n, "TooLong")
            assert row["__windows"] is None
            assert [row[name] for name in KNOWN] == [None] * 3
            assert row["num_tokens_in"] == (n + 2 if n else None)
            continue
        assert kind is None
        windows = row["__windows"]
        pieces = list(spans(n, room, 1)) if on_long == "windows" else [(0, min(n, room))]
        assert [(w["start"], w["size"]) for w in windows] == pieces
        for window in windows:
            ids = window["input_ids"]
            assert (len(ids), ids[0], ids[-1]) == (window["size"] + 2, 0, 2)
        seen = n if on_long == "windows" else min(n, room)
        assert row["num_tokens_in"] == n + 2
        assert row["num_windows"] == len(pieces)
        assert row["coverage"] == seen / n
        assert row["truncated"] == (seen < n)


def test_on_long_error(led_directory: Path) -> None:
    texts = ["a " * 100, "a b c", None, "a b c d"]
    block = prepare(task_of(led_directory, max_source_tokens=5, on_long="error"), texts)
    assert kinds(block) == ["TooLong", None, "NullText", "TooLong"]
    assert block.column("error")[3].as_py() == {
        "stage": "tokenize",
        "type": "TooLong",
        "message": "6 tokens, max_source_tokens is 5; cut it or raise the limit",
    }
    assert block.column("num_tokens_in").to_pylist()[1:] == [5, None, 6]
    assert block.column("__windows").is_null().to_pylist() == [True, False, True, True]
    assert block.column("truncated").to_pylist() == [None, False, None, None]


# --- what a task adds: a question, words, the place of every token ---


@dataclasses.dataclass(frozen=True)
class Asking(Summarize):
    """Reads a question in front of every window, in two parts, and needs the text."""

    needs_text: ClassVar[bool] = True

    @classmethod
    def inputs_of(cls, options: Any) -> tuple[InputColumn, ...]:
        return (*super().inputs_of(options), InputColumn("question", ("question",)))

    def frames(self, block: pa.Table) -> list[list[Frame]]:
        tokenizer = tokenizer_of(self.model)
        return [
            [Frame((0, *tokenizer.encode(question)[1:-1]), (2,), 1, 1, part) for part in range(2)]
            for question in block.column("__question").to_pylist()
        ]


def asking(directory: Path, **options: Any) -> Asking:
    settings = {"model": str(directory), "on_long": "windows", "window_tokens": 24} | options
    return Asking.from_options(SummarizeOptions(**settings), device="cpu")


def test_offsets_lie_in_the_original_text(led_directory: Path) -> None:
    task = asking(led_directory)
    texts = ["  Grüße, 👩‍👩‍👧 and\n\nmore  words " * 5, "short", None]
    questions = ["Who greets?", None, "Why?"]
    block = task.prepare(
        pa.table(
            {
                "__text": pa.array(texts, pa.large_string()),
                "__question": pa.array(questions, pa.large_string()),
            }
        )
    )
    assert kinds(block) == [None, "NullText", "NullText"]
    messages = [e and e["message"] for e in block.column("error").to_pylist()]
    assert messages == [None, "the question is null", "the text is null"]
    (row,) = documents_of(block, ["x"], [0])
    assert row.text == texts[0]
    assert row.offsets is not None
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    own = tokenizer(texts[0], add_special_tokens=False, return_offsets_mapping=True)
    assert row.offsets.tolist() == [list(pair) for pair in own["offset_mapping"]]
    frame = tokenizer.encode("Who greets?")[1:-1]
    for window in row.windows:
        piece = own["input_ids"][window.start : window.start + window.size]
        assert window.input_ids.tolist() == [0, *frame, *piece, 2]
    # Two parts of a piece are one window; the question counts as read once.
    counts = block.slice(0, 1).to_pylist()[0]
    assert counts["num_windows"] == len(row.windows) / 2 > 2
    assert counts["num_tokens_in"] == len(own["input_ids"]) + len(frame) + 2
    assert (counts["coverage"], counts["truncated"]) == (1.0, False)


def test_a_question_longer_than_a_window_fails_its_row_alone(led_directory: Path) -> None:
    task = asking(led_directory)
    block = task.prepare(
        pa.table(
            {
                "__text": pa.array(["a b c d e"] * 3, pa.large_string()),
                "__question": pa.array(["a", "a " * 30, "a b"], pa.large_string()),
            }
        )
    )
    assert kinds(block) == [None, "TooLong", None]
    assert block.column("num_tokens_in").to_pylist()[1] > 24


def words_of(rows: list[list[str | None] | None]) -> pa.Array:
    return pa.array(rows, pa.large_list(pa.large_string()))


@dataclasses.dataclass(frozen=True)
class ReadingWords(Summarize):
    @classmethod
    def inputs_of(cls, options: Any) -> tuple[InputColumn, ...]:  # noqa: ARG003
        return (InputColumn("text", ("words",), kind="words"),)


def test_words_that_are_not_there(led_directory: Path) -> None:
    options = SummarizeOptions(model=str(led_directory))
    task = ReadingWords.from_options(options, device="cpu")
    rows = [["a", "word"], None, ["a", None], [], ["", " \n"], ["", "x"]]
    block = task.prepare(pa.table({"__text": words_of(rows)}))
    assert kinds(block) == [None, "NullText", "NullText", "EmptyText", "EmptyText", None]
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    assert input_ids(block)[0] == [tokenizer.encode("a word")]


def test_words_whose_bytes_are_not_utf8(led_directory: Path) -> None:
    options = SummarizeOptions(model=str(led_directory))
    task = ReadingWords.from_options(options, device="cpu")
    values = invalid_utf8([b"a", b"word", b"caf\xe9", b"x", b"after"])
    rows = pa.LargeListArray.from_arrays(pa.array([0, 2, 4, 5], pa.int64()), values)
    block = task.prepare(pa.table({"__text": rows}))
    assert kinds(block) == [None, "ReadError", None]
    assert "UTF-8" in block.column("error")[1].as_py()["message"]


# --- from a block to documents ---


def test_documents_are_what_was_prepared(led_directory: Path) -> None:
    task = task_of(led_directory, on_long="windows", window_tokens=20, stride_tokens=3)
    texts = [*[t[: 200 + 100 * i] for i, t in enumerate(corpus_texts(4))], None]
    block = prepare(task, texts)
    assert block.schema.field("__windows").type.value_type == WINDOW
    frame = single_frame(tokenizer_of(task.model), is_first_global=True)
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    found = documents_of(block, ["c", "a"], [2, 0])
    assert [document.id for document in found] == ["c", "a"]
    for document, row in zip(found, (2, 0), strict=True):
        ids = np.array(tokenizer.encode(texts[row])[1:-1], np.int32)
        windows, _ = cut(task, ids, [frame])
        assert (document.text, document.offsets) == (None, None)
        assert len(document.windows) == len(windows) > 1
        for got, expected in zip(document.windows, windows, strict=True):
            assert got.input_ids.tolist() == expected.input_ids.tolist()
            assert got.input_ids.flags.owndata, "it must outlive the block it came in"
            named = ("global_positions", "start", "first", "size", "part")
            assert [getattr(got, n) for n in named] == [getattr(expected, n) for n in named]


def test_a_tokenizer_is_loaded_once_per_process(led_directory: Path) -> None:
    assert tokenizer_of(str(led_directory)) is tokenizer_of(str(led_directory))
