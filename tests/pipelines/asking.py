"""A task asked without a graph: texts to prepared blocks, documents to a worker's outputs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipelines.batch.worker import Worker
from pipelines.tasks.base import Document, Output, Task
from pipelines.tasks.preparation import documents_of


def prepare(task: Task, texts: Sequence[str | None] | pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return what a task makes of these texts."""
    is_arrow = isinstance(texts, pa.Array | pa.ChunkedArray)
    return task.prepare(
        pa.table({"__text": texts if is_arrow else pa.array(texts, pa.large_string())})
    )


def documents(task: Task, texts: Mapping[str, str]) -> list[Document]:
    """Return the documents of texts by id, none of which may fail."""
    return documents_of(prepare(task, [*texts.values()]), [*texts], range(len(texts)))


def outputs(worker: Worker, asked: Iterable[Document]) -> dict[str, Output]:
    """Return what a worker answers by id, in order of completion."""
    several = list(asked)
    return {several[index].id: output for index, output in worker(several, lambda: None)}


def kinds(block: pa.Table) -> list[Any]:
    """Return the type of every row's error, None for a good row."""
    return [error and error["type"] for error in block.column("error").to_pylist()]
