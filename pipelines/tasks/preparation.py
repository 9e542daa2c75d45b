"""Texts to windows of token ids: the only place that tokenizes, cuts and marks global tokens.

A document is cut by its tokens. Every window holds some of them, with what the task repeats in each
(special tokens, a question, a choice) before and behind:

    before | document[start : start + size] | after
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longformer_core.hub import resolve
from pipelines.rows import ERROR, InputColumn, row_error

if TYPE_CHECKING:
    from pipelines.tasks.base import Document, Task

RowError = dict[str, str] | None

WINDOW = pa.struct(
    [
        pa.field("input_ids", pa.large_list(pa.int32())),
        pa.field("global_positions", pa.large_list(pa.int32())),
        pa.field("start", pa.int32()),
        pa.field("first", pa.int32()),
        pa.field("size", pa.int32()),
        pa.field("part", pa.int32()),
        pa.field("second", pa.int32()),
    ]
)
# What `prepare` returns: null on a row with an error, but for what is known of its length.
PREPARED = pa.schema(
    [
        pa.field("__windows", pa.large_list(WINDOW)),
        pa.field("__text", pa.large_string()),  # null unless the task needs it
        pa.field("__offsets", pa.large_list(pa.int32())),
        pa.field("num_tokens_in", pa.int32()),
        pa.field("num_windows", pa.int32()),
        pa.field("truncated", pa.bool_()),
        pa.field("coverage", pa.float64()),
        pa.field("error", ERROR),
    ]
)


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around a document's tokens in each window.

    global_before, global_after: how many of the first and of the last tokens of a window are
        global.
    part: which of a document's frames it is, where it has several (answers to choose from).
    second: the slot where the second text of a pair begins, if the model tells the two apart; a
        negative one counts from the end.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    global_before: int = 0
    global_after: int = 0
    part: int = 0
    second: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.before) + len(self.after)


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a document that the model reads at once.

    input_ids: [N] int32. The slots `first` to `first + size` hold the document's tokens from
        `start` on.
    part: the frame that it is in.
    second: from this slot on token types are 1; 0 where there are none.
    """

    input_ids: np.ndarray
    global_positions: tuple[int, ...]
    start: int
    first: int
    size: int
    part: int = 0
    second: int = 0

    @classmethod
    def of(cls, ids: np.ndarray, frame: Frame, start: int, size: int) -> "Window":
        """Put some of a document's tokens into a frame."""
        whole = np.concatenate(
            [
                np.asarray(frame.before, np.int32),
                ids[start : start + size].astype(np.int32, copy=False),
                np.asarray(frame.after, np.int32),
            ]
        )
        length = len(whole)
        marked = {*range(frame.global_before), *range(length - frame.global_after, length)}
        second = frame.second if frame.second >= 0 else length + frame.second
        first = len(frame.before)
        return cls(whole, tuple(sorted(marked)), start, first, size, frame.part, second)

    def as_part(self, part: int) -> "Window":
        """Return the same window as another part of its document."""
        return dataclasses.replace(self, part=part)

    @property
    def token_type_ids(self) -> np.ndarray | None:
        """[N] the types of a pair's tokens; None where all are 0."""
        if not self.second:
            return None
        return (np.arange(len(self.input_ids)) >= self.second).astype(np.int32)


@functools.lru_cache(maxsize=4)
def tokenizer_of(model: str) -> Any:
    """Return the tokenizer of a model directory, loaded once per process."""
    from longformer_core.tokenization.tokenizer import load_tokenizer

    return load_tokenizer(resolve(model))


def single_frame(tokenizer: Any, *, is_first_global: bool) -> Frame:
    """Return the frame of a text by itself: `<s> text </s>`."""
    ids, _, (start,) = tokenizer.build([])
    return Frame(tuple(ids[:start]), tuple(ids[start:]), int(is_first_global))


def context_frame(tokenizer: Any, first: Sequence[int], *, num_global: int) -> Frame:
    """Return the frame of a document that follows another text: `<s> first </s></s> text </s>`.

    num_global: how many tokens are global, `<s>` and the first text counted on.
    """
    ids, types, (_, place) = tokenizer.build(first, [])
    second = place if types.any() else 0
    return Frame(tuple(ids[:place]), tuple(ids[place:]), num_global, second=second)


def continued_frame(
    tokenizer: Any,
    second: Sequence[int],
    *,
    is_first_global: bool = False,
    is_second_global: bool = False,
    part: int = 0,
) -> Frame:
    """Return the frame of a document that another text follows: `<s> text </s></s> second </s>`.

    is_first_global: `<s>` is global. is_second_global: so is the second text, with the `</s>`
        behind it.
    """
    ids, types, (start, place) = tokenizer.build([], second)
    behind = len(ids) - place
    return Frame(
        tuple(ids[:start]),
        tuple(ids[start:]),
        global_before=int(is_first_global),
        global_after=behind if is_second_global else 0,
        part=part,
        second=-behind if types.any() else 0,
    )


def spans(num_tokens: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yield (start, size) of windows of at most `room` tokens that cover all of `num_tokens`.

    Each begins `room - stride` tokens after the one before.
    """
    start = 0
    while True:
        size = min(room, num_tokens - start)
        yield start, size
        if start + size >= num_tokens:
            return
        start += room - stride


def prepare(task: "Task", block: pa.Table) -> pa.Table:
    """Return the windows of every document of a block (see `Task.prepare`)."""
    rows = _Rows(block.num_rows)
    for column in task.inputs:
        for row, error in enumerate(_unusable(block.column(column.name), column)):
            rows.errors[row] = rows.errors[row] or error
    texts = _texts(block.column("__text"), rows.errors)
    good = pa.array([row for row, error in enumerate(rows.errors) if error is None], pa.int64())
    readable = block.take(good)
    encoded = _encode(task, texts.take(good))
    around = zip(task.frames(readable), task.extra_windows(readable), strict=True)
    for row, (ids, offsets), (frames, extra) in zip(good.to_pylist(), encoded, around, strict=True):
        rows.add(task, row, ids, offsets, frames)
        if rows.errors[row] is None:
            rows.windows[row] += extra
    return rows.table(texts if task.needs_text else None)


def cut(task: "Task", ids: np.ndarray, frames: Sequence[Frame]) -> tuple[list[Window], RowError]:
    """Return a document's windows in all its frames, or why it has none."""
    around = max(frame.num_tokens for frame in frames)
    by_windows = task.options.on_long == "windows"
    limit = task.window_tokens if by_windows else task.max_source_tokens
    room = limit - around
    length = len(ids) + around
    name = "window_tokens" if by_windows else "max_source_tokens"
    if len(ids) > room and task.options.on_long == "error":
        message = f"{length} tokens, {name} is {limit}; cut it or raise the limit"
        return [], row_error("tokenize", "TooLong", message)
    stride = task.stride_tokens if by_windows else 0
    if room <= stride and len(ids) > room:
        message = (
            f"{around} tokens stand around each piece of the document, which leaves {max(room, 0)} "
            f"of {name} {limit} for it; raise the limit"
        )
        return [], row_error("tokenize", "TooLong", message)
    size = min(len(ids), room)
    first = len(ids) - size if task.options.on_long == "truncate_left" else 0
    pieces = list(spans(len(ids), room, stride)) if by_windows else [(first, size)]
    return [Window.of(ids, frame, *piece) for piece in pieces for frame in frames], None


def documents_of(block: pa.Table, ids: Sequence[str], rows: Sequence[int]) -> "list[Document]":
    """Return the documents in these rows of a prepared block; `ids` are those of the rows."""
    from pipelines.tasks.base import Document

    found = []
    windows, texts, offsets = (block.column(n) for n in ("__windows", "__text", "__offsets"))
    for row, name in zip(rows, ids, strict=True):
        pairs = offsets[row]
        found.append(
            Document(
                name,
                [_window(value) for value in windows[row]],
                texts[row].as_py(),
                pairs.values.to_numpy().reshape(-1, 2) if pairs.is_valid else None,
            )
        )
    return found


def _window(value: pa.StructScalar) -> Window:
    return Window(
        value["input_ids"].values.to_numpy().copy(),
        tuple(value["global_positions"].as_py()),
        *(value[name].as_py() for name in ("start", "first", "size", "part", "second")),
    )


class _Rows:
    """The columns of `PREPARED`, row by row."""

    def __init__(self, num_rows: int) -> None:
        self.errors: list[RowError] = [None] * num_rows
        self.windows: list[list[Window]] = [[] for _ in range(num_rows)]
        self.offsets: list[np.ndarray | None] = [None] * num_rows
        self.lengths: list[int | None] = [None] * num_rows
        self.coverage: list[float | None] = [None] * num_rows

    def add(
        self,
        task: "Task",
        row: int,
        ids: np.ndarray,
        offsets: np.ndarray | None,
        frames: Sequence[Frame],
    ) -> None:
        self.lengths[row] = len(ids) + max(frame.num_tokens for frame in frames)
        self.windows[row], self.errors[row] = cut(task, ids, frames)
        if self.errors[row] is None:
            # Windows leave nothing out between them.
            seen = max(window.start + window.size for window in self.windows[row]) - min(
                window.start for window in self.windows[row]
            )
            self.coverage[row] = seen / len(ids) if len(ids) else 1.0
            self.offsets[row] = offsets

    def table(self, texts: pa.Array | None) -> pa.Table:
        good = [error is None for error in self.errors]
        has_no_windows = pa.array([not g for g in good], pa.bool_())
        parts = max((window.part for row in self.windows for window in row), default=0) + 1
        counts = [len({w.start for w in row}) if parts > 1 else len(row) for row in self.windows]
        every = [window for row in self.windows for window in row]
        values = pa.StructArray.from_arrays(
            [
                _lists([w.input_ids for w in every]),
                _lists([np.asarray(w.global_positions, np.int32) for w in every]),
                *(
                    pa.array([getattr(w, name) for w in every], pa.int32())
                    for name in ("start", "first", "size", "part", "second")
                ),
            ],
            fields=list(WINDOW),
        )
        ends = np.cumsum([0, *map(len, self.windows)])
        columns = {
            "__windows": pa.LargeListArray.from_arrays(
                pa.array(ends, pa.int64()), values, mask=has_no_windows
            ),
            "__text": pa.nulls(len(good), pa.large_string())
            if texts is None
            else pc.if_else(pa.array(good, pa.bool_()), texts, None),
            "__offsets": _lists([None if o is None else o.reshape(-1) for o in self.offsets]),
            "num_tokens_in": pa.array(self.lengths, pa.int32()),
            "num_windows": pa.array(
                [n if g else None for n, g in zip(counts, good, strict=True)], pa.int32()
            ),
            "truncated": pa.array(
                [None if c is None else c < 1.0 for c in self.coverage], pa.bool_()
            ),
            "coverage": pa.array(self.coverage, pa.float64()),
            "error": pa.array(self.errors, ERROR),
        }
        return pa.table(columns, schema=PREPARED)


def _lists(values: Sequence[np.ndarray | None]) -> pa.LargeListArray:
    """Return a list of int32 a value, null where it is None."""
    sizes = [0 if value is None else len(value) for value in values]
    flat = [np.zeros(0, np.int32), *(v for v in values if v is not None)]
    return pa.LargeListArray.from_arrays(
        pa.array(np.cumsum([0, *sizes]), pa.int64()),
        pa.array(np.concatenate(flat), pa.int32()),
        mask=pa.array([value is None for value in values], pa.bool_()),
    )


def _encode(task: "Task", texts: pa.Array) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield each text's token ids without special ones, and where they lie if the task needs it."""
    tokenizer = tokenizer_of(task.model)
    if task.needs_text:
        for ids, starts, ends in tokenizer.encode_with_offsets(texts):
            yield ids, np.stack([starts, ends], axis=1)
        return
    ids = tokenizer.encode_arrow(texts)
    frame = single_frame(tokenizer, is_first_global=False)
    before, after = len(frame.before), len(frame.after)
    values, ends = ids.values.to_numpy(), ids.offsets.to_numpy()
    for row in range(len(ids)):
        yield values[ends[row] + before : ends[row + 1] - after], None


def _texts(column: pa.ChunkedArray, errors: Sequence[RowError]) -> pa.Array:
    """Return the documents as text, null where a row has an error; words joined by spaces."""
    texts = column.combine_chunks()
    is_good = pa.array([error is None for error in errors], pa.bool_())
    texts = pc.if_else(is_good, texts, pa.scalar(None, texts.type))
    if pa.types.is_large_list(texts.type):
        joined = [None if words is None else " ".join(words) for words in texts.to_pylist()]
        return pa.array(joined, pa.large_string())
    return texts


def _unusable(column: pa.ChunkedArray, what: InputColumn) -> list[RowError]:
    """Return the error of every row without text. Control characters are text; blanks are not."""
    values = column.combine_chunks()
    errors = _not_utf8(values, what.role)
    if not what.required:
        return errors
    if what.kind == "words":
        return [
            error or _unusable_words(words.as_py(), what.role)
            for error, words in zip(errors, values, strict=True)
        ]
    readable = pc.if_else(pa.array([e is None for e in errors], pa.bool_()), values, "-")
    blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(readable)), 0).to_pylist()
    for row, is_blank in enumerate(blank):
        if is_blank is None:
            errors[row] = row_error("read", "NullText", f"the {what.role} is null")
        elif is_blank:
            errors[row] = row_error("read", "EmptyText", f"the {what.role} is empty or blank")
    return errors


def _unusable_words(words: list[str | None] | None, role: str) -> RowError:
    if words is None or None in words:
        return row_error("read", "NullText", f"the {role} is null, or has a null in it")
    if not any(word and word.strip() for word in words):
        return row_error("read", "EmptyText", f"the {role} has no words, or blank ones only")
    return None


def _not_utf8(texts: pa.Array, role: str) -> list[RowError]:
    """Return the error of every row whose bytes are not UTF-8: Arrow hands them on unseen."""
    errors: list[RowError] = [None] * len(texts)

    def is_bad(values: pa.Array) -> bool:
        # The words of these rows alone: a list would have all of its array's looked at.
        strings = values.flatten() if pa.types.is_large_list(values.type) else values
        try:
            strings.validate(full=True)
        except pa.ArrowInvalid:
            return True
        return False

    if is_bad(texts):
        for row in range(len(texts)):
            if is_bad(texts.slice(row, 1)):
                errors[row] = row_error("read", "ReadError", f"the {role} is not valid UTF-8")
    return errors
