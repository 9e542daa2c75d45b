"""Documents in, outputs out: prepared as the batch job prepares them, computed by a backend."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from longformer_core.scheduling.handle import Tokens
from pipelines.serve.api import Usage
from pipelines.serve.backend import Backend, Event, Overloaded, Progress, Reply, WorkerDied
from pipelines.serve.errors import ApiError, of_document, of_row
from pipelines.serve.options import ServeOptions, with_options
from pipelines.tasks.base import Document, Task
from pipelines.tasks.preparation import documents_of

if TYPE_CHECKING:
    from pipelines.serve.metrics import Metrics

# Of the time that a full queue takes: so long nobody is asked whether there is room again.
_HELD_SHARE = 0.1

T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Answer:
    """A document's columns, as the batch job writes them, and what it took."""

    columns: Mapping[str, Any]
    usage: Usage


@dataclass(frozen=True)
class Prepared:
    """A document ready to be computed, and what is known of it by now."""

    document: Document
    usage: Usage


class Service:
    """A task's model behind an API. It knows no HTTP.

    >>> service = Service(task, EngineHost(task, device="cpu", max_queued_tokens=10_000), options)
    >>> (answer,) = await service.answer(task, [{"text": "A long document."}], timeout_s=10)
    """

    def __init__(
        self,
        task: Task,
        backend: Backend,
        options: ServeOptions,
        metrics: "Metrics | None" = None,
    ) -> None:
        self.task, self.backend, self.options = task, backend, options
        self.name = options.public_name
        self.metrics = metrics
        self._full_until, self._wait_s = 0.0, 0.0
        # Tokenizing a book takes longer than others should wait for the loop.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="longhaul-prepare")

    async def answer(
        self, task: Task, rows: Sequence[Mapping[str, Any]], timeout_s: float | None = None
    ) -> list[Answer]:
        """Return what becomes of documents, in their order; all of them or an error.

        task: of this service, perhaps with other options. rows: texts by the roles of its inputs.
        Raises: ApiError.
        """
        self._check_room()
        limit_s = self._limit_s(timeout_s)
        with _deadline(limit_s):
            async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
                began = time.monotonic()
                prepared = await self._prepare(task, rows)
                left_s = limit_s - (time.monotonic() - began)
                tasks = [group.create_task(self._one(task, each, left_s)) for each in prepared]
        return [self._counted(each.result()) for each in tasks]

    async def stream(
        self, task: Task, row: Mapping[str, Any], timeout_s: float | None = None
    ) -> AsyncGenerator[Tokens | Progress | Answer]:
        """Yield what becomes of a document while it is computed; at last its answer.

        Raises: ApiError, also after something was yielded.
        """
        self._check_room()
        limit_s = self._limit_s(timeout_s)
        began = time.monotonic()
        (prepared,) = await self._prepare(task, [row])
        left_s = limit_s - (time.monotonic() - began)
        events, is_first = self.backend.stream(task, prepared.document, left_s), True
        # An asyncio.timeout around a yield would be left in another task: each step has its own.
        async with contextlib.aclosing(events):
            while True:
                with _deadline(limit_s):
                    async with asyncio.timeout_at(
                        asyncio.get_running_loop().time() + began + limit_s - time.monotonic()
                    ):
                        event: Event = await anext(events)
                if not isinstance(event, Tokens | Progress):
                    self._note(event)
                    yield self._counted(_answer(prepared, event))
                    return
                if isinstance(event, Tokens) and is_first and self.metrics is not None:
                    self.metrics.observe("first_token", time.monotonic() - began)
                is_first = is_first and not isinstance(event, Tokens)
                yield event

    async def _one(self, task: Task, prepared: Prepared, left_s: float) -> Answer:
        reply = await self.backend.answer(task, prepared.document, left_s)
        self._note(reply)
        return _answer(prepared, reply)

    def _check_room(self) -> None:
        """Raise ApiError while the last refusal still stands.

        To refuse must cost little, or refusals are what a server is busy with: neither the text is
        tokenized nor a replica asked until a part of what waited is done.
        """
        left_s = self._full_until - time.monotonic()
        if left_s > 0:
            raise ApiError("overloaded", "the queue is full; come back later", self._wait_s)

    def _note(self, reply: Reply) -> None:
        if isinstance(reply, Overloaded):
            self._wait_s = reply.retry_after_s
            self._full_until = time.monotonic() + _HELD_SHARE * reply.retry_after_s

    def _limit_s(self, timeout_s: float | None) -> float:
        return min(timeout_s or self.options.timeout_s, self.options.timeout_s)

    async def _prepare(self, task: Task, rows: Sequence[Mapping[str, Any]]) -> list[Prepared]:
        if len(rows) > self.options.max_items:
            raise ApiError(
                "too_large",
                f"{len(rows)} texts; one request takes at most {self.options.max_items}: send "
                "several requests",
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, prepare, task, rows)

    def _counted(self, answer: Answer) -> Answer:
        if self.metrics is not None:
            usage = answer.usage
            self.metrics.count("documents")
            self.metrics.count("tokens_in", usage.tokens_in)
            self.metrics.count("tokens_out", usage.tokens_out or 0)
            self.metrics.count("windows", usage.windows)
            self.metrics.count("truncated", int(usage.truncated))
        return answer


def prepare(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[Prepared]:
    """Return documents of rows, windows and all. Raises: ApiError for one that has none."""
    table = pa.table(
        {
            column.name: pa.array([row[column.role] for row in rows], column.type)
            for column in task.inputs
        }
    )
    block = task.prepare(table)
    names = ["inputs" if len(rows) == 1 else f"inputs[{number}]" for number in range(len(rows))]
    for error, name in zip(block.column("error").to_pylist(), names, strict=True):
        if error is not None:
            raise of_row(error, name)
    # The same text is sampled the same with the same seed, wherever it stands in a request.
    documents = documents_of(block, [""] * len(rows), range(len(rows)))
    counts = block.select(["num_tokens_in", "num_windows", "truncated", "coverage"]).to_pylist()
    return [
        Prepared(
            document,
            Usage(
                tokens_in=count["num_tokens_in"],
                tokens_out=None,
                windows=count["num_windows"],
                truncated=count["truncated"],
                coverage=count["coverage"],
            ),
        )
        for document, count in zip(documents, counts, strict=True)
    ]


def with_windows(task: T, window_tokens: int | None, stride_tokens: int | None) -> T:
    """Return a task that reads in windows of these sizes, where one is given."""
    if window_tokens is None and stride_tokens is None:
        return task
    window, stride = window_tokens or task.window_tokens, stride_tokens
    if stride is None:
        stride = min(task.stride_tokens, max(0, window - 3))
    if window > task.max_source_tokens or window < 3 or stride > window - 3:
        raise ApiError(
            "invalid",
            f"windows of {window} tokens that share {stride}: a window has 3 to "
            f"{task.max_source_tokens} tokens and shares at most {window - 3}",
        )
    task = with_options(task, "window")
    return dataclasses.replace(task, window_tokens=window, stride_tokens=stride)


def _answer(prepared: Prepared, reply: Reply) -> Answer:
    if isinstance(reply, Overloaded):
        raise ApiError(
            "overloaded",
            f"{reply.queued_tokens} tokens wait already; come back when they are done",
            reply.retry_after_s,
        )
    if isinstance(reply, WorkerDied):
        raise ApiError(
            "worker_died", f"{reply.tries} model replicas died while they computed this document"
        )
    if reply.error is not None:
        raise of_document(reply.error)
    usage = prepared.usage.model_copy(update={"tokens_out": reply.num_tokens_out})
    return Answer(reply.columns, usage)


@contextlib.contextmanager
def _deadline(limit_s: float) -> Iterator[None]:
    """Turn a timeout, and the group around an error, into the error itself."""
    try:
        yield
    except TimeoutError:
        raise ApiError(
            "deadline", f"not done after {limit_s:g} s; allow more, or ask for less"
        ) from None
    except BaseExceptionGroup as group:
        error = next((e for e in group.exceptions if isinstance(e, ApiError)), group.exceptions[0])
        raise error from None
