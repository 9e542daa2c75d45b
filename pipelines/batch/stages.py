"""The operators of the batch graph and what they ask of a task.

A block is an Arrow table, one row per document. A row that fails carries its error on: it never
leaves the stream, so that every row can be accounted for at the end.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from longformer_core.errors import LongformerError, NonFiniteError, OutOfMemoryError
from pipelines.batch.heap import give_memory_back
from pipelines.batch.ledger import Order, Tally, call, this_actor
from pipelines.batch.overlap import Room, Stopwatch
from pipelines.batch.throttle import Every
from pipelines.corpus.listing import ID, READ_ERROR, TEXT
from pipelines.errors import RunFailed
from pipelines.rows import ERROR, output_schema, row_error
from pipelines.tasks.base import Encoder, Output, Task

INPUT_IDS = "__input_ids"
_LEDGER_INTERVAL_S = 1.0
# The least time from when a worker gives its free memory back to when it does so again: taking it
# anew costs the next blocks up to a tenth of their time.
_MEMORY_INTERVAL_S = 60.0


class Tokenize:
    """Block of texts -> block of token ids and counts. The text ends here."""

    def __init__(self, task: Task, kept: list[str]) -> None:
        self.task, self.kept = task, kept
        self._encoder: Encoder | None = None

    def __call__(self, block: pa.Table) -> pa.Table:
        if self._encoder is None:
            self._encoder = _encoder_of(self.task)
        encoded = self._encoder(block.column(TEXT))
        read_errors = block.column(READ_ERROR).to_pylist()
        errors = [
            row_error("read", "ReadError", read) if read is not None else error
            for read, error in zip(read_errors, encoded.errors, strict=True)
        ]
        columns = {
            ID: block.column(ID),
            INPUT_IDS: encoded.input_ids,
            "num_tokens_in": encoded.num_tokens_in,
            "num_windows": encoded.num_windows,
            "truncated": encoded.truncated,
            "coverage": encoded.coverage,
            "error": pa.array(errors, ERROR),
        }
        return pa.table(columns | {name: block.column(name) for name in self.kept})


_encoders: dict[str, Encoder] = {}


def _encoder_of(task: Task) -> Encoder:
    """The task's encoder, loaded once per worker process: tokenize tasks share processes."""
    key = repr(task)
    if key not in _encoders:
        _encoders.clear()
        _encoders[key] = task.load_encoder()
    return _encoders[key]


class Generate:
    """Block of token ids -> block of output rows, on a model that stays loaded.

    Several threads call it at once, each with a block: while the last documents of one block are
    generated, those of another keep the model busy.
    """

    def __init__(
        self,
        task: Task,
        ledger: Any,
        device: str,
        num_threads: int,
        memory_share: float,
        kept: pa.Schema,
    ) -> None:
        self.ledger = ledger
        self.schema = output_schema(task.columns, kept)
        self.task_columns = task.columns.names
        self.name = uuid.uuid4().hex  # of this process: its successor has another
        call(ledger, "loading", self.name, this_actor())
        self.worker = task.load_worker(device, num_threads, memory_share)
        call(ledger, "loaded", self.name)
        self._room, self._stopwatch = Room(), Stopwatch()
        self._tell, self._give_back = Every(_LEDGER_INTERVAL_S), Every(_MEMORY_INTERVAL_S)

    def __call__(self, block: pa.Table) -> pa.Table:
        key = _key(block)
        # Blocks begin inside: when the process dies, one that waited at the door is not in doubt.
        with self._room.shared():
            order = self._begin(key)
            if not order.one_by_one:
                return self._generate(key, order, block)
        # The process died on this block, or on another that ran beside it. Until the ledger has
        # its rows nothing else may run here, or a document would be blamed for somebody else's.
        with self._room.alone():
            return self._generate(key, order, block)

    def _begin(self, key: str) -> Order:
        order: Order = call(self.ledger, "begin", key, self.name)
        if order.stop:
            # The driver ends the run as soon as the blocks before this one are written.
            time.sleep(30.0)
            raise RunFailed("the error budget is spent")
        return order

    def _generate(self, key: str, order: Order, block: pa.Table) -> pa.Table:
        # What earlier blocks left. Not at their end: their rows would wait for it.
        if self._give_back.is_due():
            give_memory_back()
        self._stopwatch.start()
        ids = block.column(ID).to_pylist()
        runnable = [i for i, ok in enumerate(block.column("error").is_null().to_pylist()) if ok]
        documents = {i: (ids[i], _token_ids(block, i)) for i in runnable}
        outputs = dict(self._run(key, order, documents))
        rows = self._assemble(block, outputs)
        tally, samples = _tally(rows, self._stopwatch.stop())
        call(self.ledger, "finish", key, tally, samples)
        return rows

    def _run(
        self, key: str, order: Order, documents: dict[int, tuple[str, Sequence[int]]]
    ) -> Iterator[tuple[int, Output]]:
        if not order.one_by_one:
            indices = list(documents)
            for position, output in self.worker(list(documents.values()), self._moved):
                yield indices[position], output
            return
        for index, document in documents.items():
            if document[0] in order.given_up:
                yield index, Output({}, error=WorkerDiedError(document[0]))
                continue
            call(self.ledger, "alone", key, document[0])
            for _, output in self.worker([document], self._moved):
                yield index, output

    def _moved(self) -> None:
        if self._tell.is_due():
            self.ledger.moved.remote()

    def _assemble(self, block: pa.Table, outputs: dict[int, Output]) -> pa.Table:
        errors = block.column("error").to_pylist()
        tokens_out: list[int | None] = [None] * block.num_rows
        values: dict[str, list[Any]] = {c: [None] * block.num_rows for c in self.task_columns}
        failed_here = set()
        for index, output in outputs.items():
            if output.error is not None:
                errors[index] = row_error("generate", _error_type(output.error), str(output.error))
                failed_here.add(index)
                continue
            tokens_out[index] = output.num_tokens_out
            for name in self.task_columns:
                values[name][index] = output.columns[name]
        assert all(e is not None or i in outputs for i, e in enumerate(errors)), "a row was lost"
        good = pa.array([e is None for e in errors], pa.bool_())
        columns: dict[str, Any] = {
            name: block.column(name) if name in block.column_names else None
            for name in self.schema.names
        }
        for name in ("num_windows", "truncated", "coverage"):
            columns[name] = pc.if_else(good, block.column(name), None)
        columns |= values | {"num_tokens_out": tokens_out, "error": errors}
        arrays = [
            pa.array(c, f.type) if isinstance(c := columns[f.name], list) else c.cast(f.type)
            for f in self.schema
        ]
        return pa.table(arrays, schema=self.schema)


class WorkerDiedError(LongformerError):
    """A document that was alone in its worker when the process died."""

    def __init__(self, document: str) -> None:
        super().__init__(f"the worker process died twice on document {document!r}")


def _error_type(error: Exception) -> str:
    kinds = {
        NonFiniteError: "NonFinite",
        OutOfMemoryError: "OutOfMemory",
        WorkerDiedError: "WorkerDied",
    }
    return next((name for kind, name in kinds.items() if isinstance(error, kind)), "ModelError")


def _key(block: pa.Table) -> str:
    """The same for the same rows, in whatever process they are."""
    return str(xxhash.xxh64("\0".join(block.column(ID).to_pylist()).encode()).hexdigest())


def _token_ids(block: pa.Table, row: int) -> Sequence[int]:
    ids: Sequence[int] = block.column(INPUT_IDS)[row].values.to_numpy().copy()
    return ids


def _tally(rows: pa.Table, seconds: float) -> tuple[Tally, dict[str, str]]:
    errors = [e for e in rows.column("error").to_pylist() if e is not None]
    samples = {e["type"]: e["message"] for e in reversed(errors)}
    tally = Tally(rows=rows.num_rows, generate_s=seconds)
    tally.errors.update(e["type"] for e in errors)
    return (
        Tally(
            rows=rows.num_rows,
            tokens_in=pc.sum(rows.column("num_tokens_in")).as_py() or 0,
            tokens_out=pc.sum(rows.column("num_tokens_out")).as_py() or 0,
            errors=tally.errors,
            generate_s=seconds,
        ),
        samples,
    )
