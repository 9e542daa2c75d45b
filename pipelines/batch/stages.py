"""The operators of the batch graph and what they ask of a task.

A block is an Arrow table, one row per document. A row that fails carries its error on: it never
leaves the stream, so that every row can be accounted for at the end.
"""

import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from longformer_core.errors import LongformerError, NonFiniteError, OutOfMemoryError
from pipelines.batch.ledger import BlockAssignment, Tally, call, this_actor
from pipelines.batch.worker import Worker
from pipelines.batch.worker_process import ReadWriteLock, Throttle, give_memory_back
from pipelines.corpus.listing import ID, READ_ERROR
from pipelines.errors import RunFailed
from pipelines.rows import ERROR, output_schema, row_error
from pipelines.tasks.base import Document, Output, Task
from pipelines.tasks.preparation import documents_of

_LEDGER_INTERVAL_S = 1.0
# The least time from when a worker gives its free memory back to when it does so again: taking it
# anew costs the next blocks up to a tenth of their time.
_MEMORY_INTERVAL_S = 60.0


class Tokenize:
    """Block of input columns -> block of windows and counts."""

    def __init__(self, task: Task, kept: list[str]) -> None:
        self.task, self.kept = task, kept

    def __call__(self, block: pa.Table) -> pa.Table:
        prepared = self.task.prepare(block)
        errors = [
            error if read is None else row_error("read", "ReadError", read)
            for read, error in zip(
                block.column(READ_ERROR).to_pylist(),
                prepared.column("error").to_pylist(),
                strict=True,
            )
        ]
        place = prepared.schema.get_field_index("error")
        prepared = prepared.set_column(place, "error", pa.array(errors, ERROR))
        columns = {ID: block.column(ID), **{name: block.column(name) for name in self.kept}}
        for name, column in columns.items():
            prepared = prepared.append_column(name, column)
        return prepared


class Generate:
    """Block of windows -> block of output rows, on a model that stays loaded.

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
        self.worker = Worker(task, device, num_threads, memory_share)
        call(ledger, "loaded", self.name)
        self._process = ReadWriteLock()
        self._tell, self._give_back = Throttle(_LEDGER_INTERVAL_S), Throttle(_MEMORY_INTERVAL_S)

    def __call__(self, block: pa.Table) -> pa.Table:
        key = _key(block)
        # Blocks begin inside: when the process dies, one that waited at the door is not in doubt.
        with self._process.read():
            assignment = self._begin(key)
            if not assignment.one_by_one:
                return self._generate(key, assignment, block)
        # The process died on this block, or on another that ran beside it. Until the ledger has
        # its rows nothing else may run here, or a document would be blamed for somebody else's.
        with self._process.write():
            return self._generate(key, assignment, block)

    def _begin(self, key: str) -> BlockAssignment:
        assignment: BlockAssignment = call(self.ledger, "begin", key, self.name)
        if assignment.stop:
            # The driver ends the run as soon as the blocks before this one are written.
            time.sleep(30.0)
            raise RunFailed("the error budget is spent")
        return assignment

    def _generate(self, key: str, assignment: BlockAssignment, block: pa.Table) -> pa.Table:
        # What earlier blocks left. Not at their end: their rows would wait for it.
        if self._give_back.is_due():
            give_memory_back()
        runnable = [i for i, ok in enumerate(block.column("error").is_null().to_pylist()) if ok]
        ids = block.column(ID).take(pa.array(runnable, pa.int64())).to_pylist()
        documents = dict(zip(runnable, documents_of(block, ids, runnable), strict=True))
        outputs = dict(self._run(key, assignment, documents))
        rows = self._assemble(block, outputs)
        tally, samples = _tally(rows)
        call(self.ledger, "finish", key, tally, samples)
        return rows

    def _run(
        self, key: str, assignment: BlockAssignment, documents: dict[int, Document]
    ) -> Iterator[tuple[int, Output]]:
        if not assignment.one_by_one:
            indices = list(documents)
            for position, output in self.worker(list(documents.values()), self._moved):
                yield indices[position], output
            return
        for index, document in documents.items():
            if document.id in assignment.given_up:
                yield index, Output({}, error=WorkerDiedError(document.id))
                continue
            call(self.ledger, "alone", key, document.id)
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


def _tally(rows: pa.Table) -> tuple[Tally, dict[str, str]]:
    errors = [e for e in rows.column("error").to_pylist() if e is not None]
    samples = {e["type"]: e["message"] for e in reversed(errors)}
    tally = Tally(
        rows=rows.num_rows,
        tokens_in=pc.sum(rows.column("num_tokens_in")).as_py() or 0,
        tokens_out=pc.sum(rows.column("num_tokens_out")).as_py() or 0,
        errors=Counter(e["type"] for e in errors),
    )
    return tally, samples
