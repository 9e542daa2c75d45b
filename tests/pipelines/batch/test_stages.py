"""The operators on their own blocks: every row that goes in comes out, in its place."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pytest

from longformer_core.errors import (
    LongformerError,
    NonFiniteError,
    OutOfMemoryError,
    TooLongError,
)
from pipelines.batch import stages
from pipelines.batch.ledger import Ledger, Tally
from pipelines.batch.stages import Generate, Tokenize
from pipelines.corpus.listing import ID, READ_ERROR
from pipelines.errors import RunFailed
from pipelines.rows import ERROR, output_schema, row_error
from pipelines.tasks.base import Document, Output, Process
from pipelines.tasks.preparation import PREPARED

KEPT = pa.schema([("year", pa.int64())])
COLUMNS = pa.schema([("summary", pa.large_string())])


@dataclass(frozen=True)
class Request:
    document: str
    ids: list[int]


@dataclass(frozen=True)
class Result:
    ids: list[int] = field(default_factory=list)
    error: Exception | None = None


class Letters:
    """A task whose tokens are code points and whose summary is the text backwards.

    It is its own engine. `accidents` says of a document that it is lost, or its error.
    """

    name = "letters"
    columns = COLUMNS

    def __init__(self, accidents: dict[str, Any] | None = None) -> None:
        self.accidents = accidents or {}
        self.calls: list[list[str]] = []
        self.meeting: threading.Barrier | None = None
        self.num_inside = 0

    def prepare(self, block: pa.Table) -> pa.Table:
        rows = [self._prepare(text) for text in block.column("__text").to_pylist()]
        return pa.Table.from_pylist(rows, schema=PREPARED)

    def _prepare(self, text: str | None) -> dict[str, Any]:
        if not text:
            kind = "NullText" if text is None else "EmptyText"
            return {"error": row_error("read", kind, "no text")}
        window = {"input_ids": [*map(ord, text)], "global_positions": [], "start": 0}
        window |= {"first": 0, "size": len(text), "part": 0}
        counts = {"num_windows": 1, "truncated": False, "coverage": 1.0}
        return {"__windows": [window], "num_tokens_in": len(text)} | counts

    def load_engine(self, device: str, memory_share: float) -> "Letters":
        assert (device, memory_share) == ("cpu", 0.5)
        return self

    def process(self, document: Document) -> Process:
        (window,) = document.windows
        (result,) = yield [Request(document.id, window.input_ids.tolist())]
        return Output({"summary": "".join(map(chr, result.ids))}, len(result.ids))

    def run(
        self, requests: Sequence[Request], on_progress: Callable[[], None]
    ) -> Iterator[tuple[int, Result]]:
        self.calls.append([request.document for request in requests])
        self.num_inside += 1
        if self.meeting is not None and len(requests) > 1:
            self.meeting.wait()
        yield from self._results(requests, on_progress)
        self.num_inside -= 1

    def _results(
        self, requests: Sequence[Request], on_progress: Callable[[], None]
    ) -> Iterator[tuple[int, Result]]:
        for index, request in reversed(list(enumerate(requests))):
            on_progress()
            accident = self.accidents.get(request.document)
            if accident == "lost":
                continue
            if accident is not None:
                yield index, Result(error=accident)
            else:
                yield index, Result(request.ids[::-1])


def block_of(
    texts: list[str | None], read_errors: dict[int, str] | None = None, name: str = "row"
) -> pa.Table:
    errors = read_errors or {}
    return pa.table(
        {
            ID: pa.array([f"{name} {i}" for i in range(len(texts))], pa.string()),
            "__text": pa.array(texts, pa.large_string()),
            READ_ERROR: pa.array([errors.get(i) for i in range(len(texts))], pa.string()),
            "year": pa.array(range(len(texts)), pa.int64()),
        }
    )


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """A ledger that is called where it stands, with what it was told."""
    monkeypatch.setattr(stages, "call", lambda actor, method, *a: getattr(actor, method)(*a))
    monkeypatch.setattr(stages, "this_actor", object)
    return Ledger(max_failed=100, failed_before=0)


def generate(task: Letters, ledger: Ledger) -> Generate:
    return Generate(task, ledger, "cpu", 2, 0.5, KEPT)


def run(task: Letters, ledger: Ledger, block: pa.Table) -> list[dict[str, Any]]:
    rows = generate(task, ledger)(Tokenize(task, KEPT.names)(block))
    assert rows.schema == output_schema(COLUMNS, KEPT)
    found: list[dict[str, Any]] = rows.to_pylist()
    return found


# --- tokenize ---


def test_tokenize_drops_the_text_and_keeps_the_rest() -> None:
    block = Tokenize(Letters(), ["year"])(block_of(["ab", "", "c"]))
    assert block.column_names == [*PREPARED.names, ID, "year"]
    windows = block["__windows"].to_pylist()
    assert [row and row[0]["input_ids"] for row in windows] == [[97, 98], None, [99]]
    assert block["__text"].null_count == 3
    assert block["year"].to_pylist() == [0, 1, 2]
    assert [e and e["type"] for e in block["error"].to_pylist()] == [None, "EmptyText", None]
    assert block.schema.field("error").type == ERROR


def test_what_could_not_be_read_is_the_first_error() -> None:
    block = Tokenize(Letters(), [])(block_of([None, "still there", "x"], {0: "page", 1: "page"}))
    errors = block["error"].to_pylist()
    assert errors[0] == errors[1] == row_error("read", "ReadError", "page")
    assert errors[2] is None


# --- generate ---


def test_outputs_find_their_rows_whatever_their_order(ledger: Ledger) -> None:
    rows = run(Letters(), ledger, block_of(["abc", "", "de", None, "f"]))
    assert [row["summary"] for row in rows] == ["cba", None, "ed", None, "f"]
    assert [row["id"] for row in rows] == [f"row {i}" for i in range(5)]
    assert [row["year"] for row in rows] == list(range(5))
    assert [row["num_tokens_out"] for row in rows] == [3, None, 2, None, 1]
    assert rows[0]["error"] is None
    assert rows[3]["error"]["type"] == "NullText"
    done = ledger.snapshot().done
    assert (done.rows, done.failed, done.tokens_in, done.tokens_out) == (5, 2, 6, 6)
    assert dict(done.errors) == {"EmptyText": 1, "NullText": 1}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NonFiniteError("NaN"), "NonFinite"),
        (OutOfMemoryError("too big"), "OutOfMemory"),
        (LongformerError("boom"), "ModelError"),
        (TooLongError("long"), "ModelError"),
    ],
)
def test_errors_of_the_model_stay_with_their_row(
    ledger: Ledger, error: Exception, kind: str
) -> None:
    rows = run(Letters({"row 1": error}), ledger, block_of(["abc", "de", "f"]))
    assert rows[1]["error"] == {"stage": "generate", "type": kind, "message": str(error)}
    for name in ("summary", "num_tokens_out", "num_windows", "truncated", "coverage"):
        assert rows[1][name] is None
    assert rows[1]["num_tokens_in"] == 2, "what is known of a failed row stays"
    assert rows[1]["year"] == 1
    assert [row["summary"] for row in rows] == ["cba", None, "f"]
    assert ledger.snapshot().samples == {kind: str(error)}


@pytest.mark.parametrize("texts", [[], [None], ["", None, ""]])
def test_blocks_without_work(ledger: Ledger, texts: list[str | None]) -> None:
    rows = run(Letters(), ledger, block_of(texts))
    assert [row["summary"] for row in rows] == [None] * len(texts)
    assert ledger.snapshot().done.failed == len(texts)


def test_a_worker_that_forgets_a_document_is_caught(ledger: Ledger) -> None:
    with pytest.raises(AssertionError, match="a row was lost"):
        run(Letters({"row 1": "lost"}), ledger, block_of(["abc", "de", "f"]))


def test_a_block_that_lost_its_worker_goes_one_by_one(ledger: Ledger) -> None:
    task = Letters()
    operator, block = generate(task, ledger), Tokenize(task, ["year"])(block_of(["a", "b", "c"]))
    keys: list[str] = []
    begin = ledger.begin

    def noting(key: str, worker: str) -> Any:
        keys.append(key)
        return begin(key, worker)

    ledger.begin = noting  # type: ignore[method-assign]
    task.accidents["row 1"] = "lost"
    with pytest.raises(AssertionError):
        operator(block)  # stands for the death of the process: it began and never finished
    with pytest.raises(AssertionError):
        generate(task, ledger)(block)
    assert task.calls == [["row 0", "row 1", "row 2"], ["row 0"], ["row 1"], ["row 2"]]
    # As if the process had died with the second document alone in it.
    ledger.alone(keys[0], "row 1")
    task.calls.clear()
    rows = generate(task, ledger)(block).to_pylist()
    assert len(set(keys)) == 1, "the same rows are the same block"
    assert task.calls == [["row 0"], ["row 2"]]
    assert [row["summary"] for row in rows] == ["a", None, "c"]
    assert rows[1]["error"]["type"] == "WorkerDied"
    assert "died twice on document 'row 1'" in rows[1]["error"]["message"]
    assert dict(ledger.snapshot().done.errors) == {"WorkerDied": 1}


def blocks_of(*names: str) -> list[pa.Table]:
    texts = ["abc", "", "de", "f"]
    return [Tokenize(Letters(), ["year"])(block_of(texts, name=name)) for name in names]


def test_memory_is_given_back_now_and_then(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back = []
    monkeypatch.setattr(stages, "give_memory_back", lambda: given_back.append(None))
    interval_s = 0.2
    monkeypatch.setattr(stages, "_MEMORY_INTERVAL_S", interval_s)
    task = Letters()
    started = time.monotonic()
    generate_rows, tokenize = generate(task, ledger), Tokenize(task, KEPT.names)
    for number in range(30):
        generate_rows(tokenize(block_of(["ab"], name=f"block {number}")))
        time.sleep(0.02)
    assert 2 <= len(given_back) <= (time.monotonic() - started) / interval_s + 1


def test_blocks_run_at_once_and_keep_their_rows(ledger: Ledger) -> None:
    blocks = blocks_of("a", "b", "c", "d")
    expected = [generate(Letters(), Ledger(100, 0))(block) for block in blocks]
    task = Letters()
    task.meeting = threading.Barrier(2, timeout=10.0)  # nobody goes on alone
    operator = generate(task, ledger)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(operator, blocks)) == expected
    done = ledger.snapshot().done
    assert (done.rows, done.failed, done.tokens_out) == (16, 4, 24)


def test_a_document_in_doubt_is_alone_in_its_process(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks lost their worker together; a third is new. Only new ones run beside others."""
    blocks = blocks_of("a", "b", "c", "d")
    lost = Letters({f"{name} {i}": "lost" for name in "ab" for i in range(4)})
    for block in blocks[:2]:
        with pytest.raises(AssertionError):
            generate(lost, ledger)(block)
    task = Letters()
    operator = generate(task, ledger)
    expected = [generate(Letters(), Ledger(100, 0))(block) for block in blocks]
    results = task._results
    company: dict[str, int] = {}

    def slow(requests: Any, on_progress: Any) -> Iterator[tuple[int, Result]]:
        before = task.num_inside
        time.sleep(0.05)
        names = " ".join(request.document for request in requests)
        company[names] = max(before, task.num_inside)
        yield from results(requests, on_progress)

    task._results = slow  # type: ignore[method-assign]
    told: list[tuple[str, str]] = []
    for method in ("alone", "finish"):
        monkeypatch.setattr(ledger, method, noting(told, method, getattr(ledger, method)))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(operator, [blocks[2], *blocks[:2], blocks[3]])) == [
            expected[i] for i in (2, 0, 1, 3)
        ]
    alone = {name for name in company if name.count(" ") == 1}
    assert alone == {f"{name} {i}" for name in "ab" for i in (0, 2, 3)}
    assert {company[name] for name in alone} == {1}
    # One block's rows are with the ledger before the next is in doubt: or the document that was
    # alone last would be blamed for the next block's.
    in_doubt = {key for method, key in told if method == "alone"}
    blocks_told = [(method, key) for method, key in told if key in in_doubt]
    assert [method for method, _ in blocks_told] == [*["alone"] * 3, "finish"] * 2
    assert len({key for _, key in blocks_told[:4]}) == len({key for _, key in blocks_told[4:]}) == 1


def noting(told: list[tuple[str, str]], name: str, method: Callable[..., None]) -> Any:
    def noted(key: str, *given: Any) -> None:
        told.append((name, key))
        method(key, *given)

    return noted


def test_when_the_budget_is_spent_no_block_begins(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    ledger.finish("before", Tally(rows=200, errors=Counter({"NullText": 101})), {})
    task = Letters()
    with pytest.raises(RunFailed, match="budget"):
        run(task, ledger, block_of(["abc"]))
    assert task.calls == []
    assert slept == [30.0]
