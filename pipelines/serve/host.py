"""An engine behind asyncio: admission by tokens, streams, a canary. One in each model replica."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from longformer_core.errors import LongformerError
from longformer_core.scheduling.handle import Tokens
from pipelines.serve.backend import Event, Overloaded, Progress, Reply, num_tokens
from pipelines.tasks.base import Document, Output, Task, advance
from pipelines.tasks.preparation import documents_of

if TYPE_CHECKING:
    from pipelines.serve.metrics import Metrics

logger = logging.getLogger(__name__)

# Tokens of a stream are sent together: at most every so many seconds.
_SEND_EVERY_S = 0.05
# An engine that has something to do and computed nothing for so long is wedged.
_WEDGED_S = 60.0
# How long what was measured counts, in seconds of work.
_MEMORY_S = 30.0
# What waits may take this share of a document's deadline; the rest is the document's own.
_WAITING_SHARE = 0.5


class EngineHost:
    """A task's model in an engine, for one event loop.

    A document is taken if what waits leaves room for it: fewer than `max_queued_tokens`, and so few
    that its deadline can be met at the measured speed. Alone, any document is taken.

    >>> host = EngineHost(task, device="cpu", max_queued_tokens=100_000)
    >>> reply = await host.answer(task, document, deadline_s=60)
    """

    def __init__(
        self,
        task: Task,
        *,
        device: str,
        max_queued_tokens: int,
        num_threads: int | None = None,
        memory_share: float = 0.8,
        on_sticky_error: Callable[[], None] | None = None,
        metrics: "Metrics | None" = None,
    ) -> None:
        """Load the model.

        on_sticky_error: called for an error that is no document's, after which nothing works.
        """
        if device == "cpu" and num_threads is not None:
            import torch

            # Ray sets OMP_NUM_THREADS from logical CPUs, which say nothing of cores.
            torch.set_num_threads(num_threads)
        self.task = task
        self.engine = task.load_engine(device, memory_share)
        self.max_queued_tokens = max_queued_tokens
        self.queued_tokens = 0
        self.queued_documents = 0
        self.speed = Speed()
        self._busy_since = time.monotonic()
        self._on_sticky_error = on_sticky_error
        self._metrics = metrics
        # Merging a long document's windows is work for a thread, the loop has others to serve.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="longhaul-merge")

    async def answer(self, task: Task, document: Document, deadline_s: float) -> Reply:
        """See `Backend.answer`."""
        reply: Reply | None = None
        events = self._events(task, document, deadline_s, is_streamed=False)
        async with contextlib.aclosing(events):
            async for event in events:
                if not isinstance(event, Tokens | Progress):
                    reply = event
        assert reply is not None, "a document ended without a reply"
        return reply

    async def stream(
        self, task: Task, document: Document, deadline_s: float
    ) -> AsyncGenerator[Event]:
        """See `Backend.stream`. Tokens come together, at most every 50 ms."""
        events = self._events(task, document, deadline_s, is_streamed=True)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    async def check(self) -> None:
        """See `Backend.check`. Beside other documents it is enough that something moves."""
        if self.queued_documents:
            still_s = time.monotonic() - max(self.engine.moved_at, self._busy_since)
            if still_s > _WEDGED_S:
                raise RuntimeError(f"the engine did nothing for {still_s:.0f} s")
            return
        try:
            async with asyncio.timeout(_WEDGED_S):
                reply = await self._compute(self.task, self._of_tokens(8), _WEDGED_S)
        except TimeoutError:
            raise RuntimeError(f"the engine did nothing for {_WEDGED_S:g} s") from None
        if reply.error is not None:
            raise RuntimeError(f"the engine fails: {reply.error}")

    async def warm_up(self, num_documents: int = 2) -> None:
        """Compute documents of the largest size that are asked of the model, and measure.

        Raises: RuntimeError when that fails: such a replica should not serve.
        """
        longest = self._of_tokens(self.task.max_source_tokens)
        for _ in range(num_documents):
            with self._admitted(num_tokens(longest)):
                reply = await self._compute(self.task, longest, math.inf)
                self.speed.note(num_tokens(longest), is_busy=True)
            if reply.error is not None:
                raise RuntimeError(f"the largest document fails: {reply.error}")

    async def _compute(self, task: Task, document: Document, deadline_s: float) -> Output:
        limit = None if math.isinf(deadline_s) else time.monotonic() + deadline_s
        async for event in self._rounds(task, document, limit, is_streamed=False):
            if isinstance(event, Output):
                return event
        raise AssertionError("a document ended without an output")

    async def _events(
        self, task: Task, document: Document, deadline_s: float, *, is_streamed: bool
    ) -> AsyncGenerator[Event]:
        tokens = num_tokens(document)
        refusal = self._refusal(tokens, deadline_s)
        if refusal is not None:
            if self._metrics is not None:
                self._metrics.count("rejected")
            yield refusal
            return
        with self._admitted(tokens):
            rounds = self._rounds(
                task, document, time.monotonic() + deadline_s, is_streamed=is_streamed
            )
            async with contextlib.aclosing(rounds):
                async for event in rounds:
                    if isinstance(event, Output):
                        self._look_at(event.error)
                        # Here, because who has the output may ask for nothing more.
                        self.speed.note(tokens if event.error is None else 0, is_busy=True)
                    yield event

    def _refusal(self, tokens: int, deadline_s: float) -> Overloaded | None:
        if not self.queued_tokens:
            return None
        wait_s = self.speed.seconds_for(self.queued_tokens)
        if self.queued_tokens + tokens <= self.max_queued_tokens and (
            wait_s <= _WAITING_SHARE * deadline_s
        ):
            return None
        return Overloaded(self.queued_tokens, wait_s)

    @contextlib.contextmanager
    def _admitted(self, tokens: int) -> Iterator[None]:
        self.speed.note(0, is_busy=self.queued_documents > 0)
        if not self.queued_documents:
            self._busy_since = time.monotonic()
        self.queued_tokens += tokens
        self.queued_documents += 1
        try:
            yield
        finally:
            self.speed.note(0, is_busy=True)
            self.queued_tokens -= tokens
            self.queued_documents -= 1

    async def _rounds(
        self, task: Task, document: Document, deadline: float | None, *, is_streamed: bool
    ) -> AsyncGenerator[Event]:
        """Ask the engine until the task has an output, and yield what is known on the way."""
        loop = asyncio.get_running_loop()
        process = task.process(document)
        results: list[Any] | None = None
        level = 0
        while True:
            step = await loop.run_in_executor(self._threads, advance, process, results)
            if isinstance(step, Output):
                yield step
                return
            level += 1
            results = []
            asked = self._ask(step, deadline, is_streamed=is_streamed)
            async with contextlib.aclosing(asked):
                async for event in asked:
                    if isinstance(event, list):
                        results = event
                    elif isinstance(event, Tokens):
                        yield event
                    elif is_streamed:
                        yield Progress(level, event, len(step))

    async def _ask(
        self, requests: list[Any], deadline: float | None, *, is_streamed: bool
    ) -> AsyncGenerator[Tokens | int | list[Any]]:
        """Yield tokens of a single request, or how many of several are done; at last all results.

        Raises nothing for what is wrong with a request: that is in its result.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

        def listen(number: int) -> Callable[[Any], None]:
            return lambda event: _post(loop, inbox, number, event)

        began = time.monotonic()
        has_tokens = is_streamed and len(requests) == 1
        name = "on_event" if has_tokens else "on_end"
        handles: list[Any] = []
        results: dict[int, Any] = {}
        left_s = None if deadline is None else max(0.001, deadline - time.monotonic())
        try:
            for number, request in enumerate(requests):
                try:
                    handle = self.engine.submit(request, left_s, **{name: listen(number)})
                except LongformerError as error:  # options that the model does not have
                    results[number] = Output({}, error=error)
                else:
                    handles.append(handle)
            sent = -math.inf
            while len(results) < len(requests):
                events = [await inbox.get()]
                if isinstance(events[0][1], Tokens):
                    await asyncio.sleep(max(0.0, sent + _SEND_EVERY_S - time.monotonic()))
                while not inbox.empty():
                    events.append(inbox.get_nowait())
                ids = [i for _, e in events if isinstance(e, Tokens) for i in e.ids]
                ended = [(n, e) for n, e in events if not isinstance(e, Tokens)]
                if ids:
                    sent = time.monotonic()
                    yield Tokens(ids)
                results |= dict(ended)
                if ended and len(requests) > 1:
                    yield len(results)
            yield [results[number] for number in range(len(requests))]
        finally:
            for handle in handles:
                if not handle.is_done:
                    handle.cancel()
                if self._metrics is not None and handle.began_at is not None:
                    waited_s = handle.began_at - began
                    self._metrics.observe("queue_time", waited_s)
                    self._metrics.count("queue_seconds", waited_s)

    def _look_at(self, error: Exception | None) -> None:
        """Give up where an error is the process's and not the document's."""
        if error is not None and is_sticky(error):
            logger.critical("the device does not work any more: %s", error)
            if self._on_sticky_error is not None:
                self._on_sticky_error()

    def _of_tokens(self, count: int) -> Document:
        """Return a document of about so many tokens, in the shape of the task."""
        columns = {}
        for column in self.task.inputs:
            is_words = column.kind == "words"
            filler = ["yes", "no"] if is_words else "Why?"
            if column.role == "text":
                words = [" a"] * max(1, count - 32)
                filler = words if is_words else "".join(words)
                if self.task.name == "fill":
                    filler = f"<mask>{filler}"
            columns[column.name] = pa.array([filler], column.type)
        task = self.task
        (document,) = documents_of(task.prepare(pa.table(columns)), ["canary"], [0])
        return document


class Speed:
    """Tokens a second while there is something to do, of the last half minute of work or so."""

    def __init__(self) -> None:
        self._tokens, self._seconds = 0.0, 0.0
        self._last = time.monotonic()

    @property
    def tokens_per_s(self) -> float | None:
        """Return what was measured; None before anything was."""
        return self._tokens / self._seconds if self._tokens and self._seconds else None

    def note(self, tokens: int, *, is_busy: bool) -> None:
        """Count tokens that are done. is_busy: something was to do since the last call."""
        now = time.monotonic()
        passed, self._last = now - self._last, now
        if is_busy:
            kept = math.exp(-passed / _MEMORY_S)
            self._tokens *= kept
            self._seconds = self._seconds * kept + passed
        self._tokens += tokens

    def seconds_for(self, tokens: int) -> float:
        """Return how long so many tokens take; 1 s while nothing is known."""
        speed = self.tokens_per_s
        return 1.0 if speed is None else tokens / speed


def is_sticky(error: BaseException | None) -> bool:
    """Return whether an error is a broken device's: CUDA gives every later call the same."""
    while error is not None:
        text = f"{type(error).__name__}: {error}"
        if ("CUDA error" in text or "AcceleratorError" in text) and "out of memory" not in text:
            return True
        error = error.__cause__
    return False


def _post(
    loop: asyncio.AbstractEventLoop, inbox: "asyncio.Queue[Any]", number: int, event: Any
) -> None:
    # A loop that is closed has nobody left who waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(inbox.put_nowait, (number, event))
