"""The half of an engine that knows no model: callers of any thread, one thread that computes."""

import abc
import atexit
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic

import torch

from longformer_core.errors import CancelledError, LongformerError, OutOfMemoryError
from longformer_core.ops.cpu.openmp import end_idle_threads
from longformer_core.scheduling.handle import Handle, O, R, Tokens
from longformer_core.scheduling.memory import available_bytes
from longformer_core.scheduling.scheduler import Load, Scheduler

logger = logging.getLogger(__name__)

# Source tokens encoded at once: from a few thousand on a CPU gains nothing from more, and tensors
# above 32 MiB, which glibc asks the system for each time, cost it its pages.
_BATCH_TOKENS = {"cpu": 8192}
_BATCH_TOKENS_ELSEWHERE = 131072
# What of the free memory an engine plans with: others take some too.
_MEMORY_SHARE = 0.8


class DocumentEngine(abc.ABC, Generic[R, O]):
    """Take documents from any thread, compute them on one, and give each of them one outcome.

    The thread lives while there is something to do. What goes wrong for several documents at once
    is found out in halves (see `Scheduler`), so that an error is one document's alone. An engine of
    this kind says how a request is checked and what one turn of the thread does.
    """

    def __init__(
        self,
        device: torch.device,
        num_bytes: Callable[[Sequence[Handle[R, O]], Sequence[Handle[R, O]]], int],
        *,
        batch_tokens: int | None,
        max_rows: int | None,
        memory_bytes: int | None,
    ) -> None:
        """See `Scheduler`; None is as many tokens and as much memory as suit the device."""
        if batch_tokens is None:
            batch_tokens = _BATCH_TOKENS.get(device.type, _BATCH_TOKENS_ELSEWHERE)
        if memory_bytes is None:
            memory_bytes = int(_MEMORY_SHARE * available_bytes(device))
        self._device, self._memory_bytes = device, memory_bytes
        # Whatever touches the scheduler or the thread's place holds the lock.
        self._lock = threading.Lock()
        self._scheduler: Scheduler[Handle[R, O]] = Scheduler(
            batch_tokens=batch_tokens,
            max_rows=max_rows,
            memory_bytes=memory_bytes,
            num_bytes=num_bytes,
        )
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._watchers: list[Callable[[], None]] = []
        # When something was computed last (time.monotonic); for who looks whether anything moves.
        self.moved_at = time.monotonic()
        # Those that loaded the model.
        end_idle_threads()

    @abc.abstractmethod
    def _check_options(self, requests: Sequence[R]) -> None:
        """Raise ConfigError, to the caller, for options that the model does not have."""

    @abc.abstractmethod
    def _prepare(self, request: R) -> R:
        """Return a request with nothing left to choose; raise the error that is its outcome."""

    @abc.abstractmethod
    def _failure(self, error: LongformerError) -> O:
        """Return the outcome of a document that has no result."""

    @abc.abstractmethod
    def _does_not_fit(self, request: R) -> OutOfMemoryError:
        """Return the error of a document that lacks memory even alone."""

    @abc.abstractmethod
    def _turn(self) -> None:
        """Begin the next pack, compute something, finish what is done (the engine's thread)."""

    @abc.abstractmethod
    def _leave(self, documents: Sequence[Handle[R, O]]) -> None:
        """Let documents go that have ended while they ran (the engine's thread)."""

    @abc.abstractmethod
    def _drop(self, documents: Sequence[Handle[R, O]]) -> None:
        """Forget everything that was computed with one of the documents."""

    def submit(
        self,
        request: R,
        deadline_s: float | None = None,
        *,
        on_event: Callable[[Tokens | O], None] | None = None,
        on_end: Callable[[O], None] | None = None,
    ) -> Handle[R, O]:
        """Compute a document as soon as there is room; return at once. Any thread may call this.

        deadline_s: seconds from now after which the outcome is a DeadlineError.
        on_event: called with what `Handle.events` yields, by the engine's thread, which waits for
            it; what is wrong with the request itself comes at once, by the caller's. In asyncio:
            `lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)`.
        on_end: the same for the outcome alone, which costs nothing for every token.
        Raises: ConfigError for options that the model does not have. What else is wrong with the
            request is in the outcome.
        """
        self._check_options([request])
        handle = Handle[R, O](request, deadline_s, on_event=on_event, on_end=on_end)
        self._take([handle])
        return handle

    def run(
        self, requests: Sequence[R], on_progress: Callable[[], None] | None = None
    ) -> Iterator[tuple[int, O]]:
        """Yield each request's index and outcome, in order of completion.

        Several threads may run documents at once; they are computed together. Long documents begin
        first. Leaving early cancels what is not done.
        on_progress: called now and then while the documents are computed; what it raises comes
            through.
        Raises: ConfigError, before any work, for options that the model does not have.
        """
        self._check_options(requests)
        return self._run(requests, on_progress)

    def load(self) -> Load:
        """Return what waits and what runs. Any thread may call this."""
        with self._lock:
            return self._scheduler.load()

    def _run(
        self, requests: Sequence[R], on_progress: Callable[[], None] | None
    ) -> Iterator[tuple[int, O]]:
        inbox: queue.SimpleQueue[tuple[int, O] | None] = queue.SimpleQueue()
        handles = [
            Handle[R, O](request, on_end=lambda out, i=i: inbox.put((i, out)))  # type: ignore[misc]
            for i, request in enumerate(requests)
        ]
        watcher = lambda: inbox.put(None)  # noqa: E731 - removed by identity
        if on_progress is not None:
            self._watchers.append(watcher)
        try:
            self._take(sorted(handles, key=lambda handle: -handle.num_tokens))
            left = len(handles)
            while left:
                found = inbox.get()
                if found is not None:
                    left -= 1
                    yield found
                else:
                    assert on_progress is not None
                    on_progress()
        finally:
            if on_progress is not None:
                self._watchers.remove(watcher)
            for handle in handles:
                if not handle.is_done:
                    handle.cancel()

    def _take(self, handles: Sequence[Handle[R, O]]) -> None:
        """Let documents wait, but for those that cannot be computed; see that a thread works."""
        end_idle_threads()
        fitting = []
        for handle in handles:
            handle.on_cancel = self._scheduler.note_cancel
            try:
                if self._is_stopping:
                    raise CancelledError("the program ends, and no document is begun any more")
                handle.request = self._prepare(handle.request)
            except LongformerError as error:
                handle.end(self._failure(error))
            else:
                fitting.append(handle)
        if not fitting:
            return
        with self._lock:
            self._scheduler.add(fitting)
            if self._thread is None:
                # Not one that the program waits for: it ends without texts that nobody will read.
                self._thread = threading.Thread(
                    target=self._work, name="longhaul-engine", daemon=True
                )
                self._thread.start()
                atexit.register(self._stop)

    def _stop(self) -> None:
        """Stop after this turn: a thread that is inside torch aborts the program that ends."""
        self._is_stopping = True
        thread = self._thread
        if thread is not None:
            thread.join()
        self._give_up(CancelledError("the program ended before the document was done"))

    @torch.inference_mode()
    def _work(self) -> None:
        """Take turns until nothing is left."""
        try:
            if self._device.type == "cuda":
                # Each thread has its own current device, where kernels are launched.
                torch.cuda.set_device(self._device)
            while self._is_wanted():
                self._expire()
                self._turn()
        except BaseException as error:
            logger.critical("the engine broke; all its documents fail", exc_info=error)
            self._give_up(error)

    def _is_wanted(self) -> bool:
        with self._lock:
            if not self._is_stopping and not self._scheduler.is_idle:
                return True
            self._forget_thread()
            return False

    def _forget_thread(self) -> None:
        self._thread = None
        atexit.unregister(self._stop)

    def _give_up(self, error: BaseException) -> None:
        """Tell everybody who waits that no outcome will come, and begin anew."""
        with self._lock:
            self._forget_thread()
            handles = self._scheduler.clear()
            self._drop(handles)
        # As below: frames that hold tensors.
        error.__traceback__ = None
        for handle in handles:
            handle.end(self._failure(self._explain(error, handle)))

    def _expire(self) -> None:
        """End the documents that were cancelled or are late, wherever they are."""
        with self._lock:
            expired = self._scheduler.expire(time.monotonic())
        for handle, error in expired:
            handle.end(self._failure(error))
        if expired:
            self._leave([handle for handle, _ in expired])

    def _next_pack(self) -> list[Handle[R, O]]:
        with self._lock:
            pack = self._scheduler.next_pack()
        now = time.monotonic()
        for handle in pack:
            handle.began_at = handle.began_at or now
        return pack

    def _finish(self, handle: Handle[R, O], outcome: O) -> None:
        with self._lock:
            self._scheduler.finish(handle)
        handle.end(outcome)

    @contextlib.contextmanager
    def _guarded(self, handles: Sequence[Handle[R, O]]) -> Iterator[None]:
        """Let what goes wrong be an error of these documents, to be tried again in halves."""
        try:
            yield
        except Exception as error:
            logger.debug("%d documents failed", len(handles), exc_info=error)
            # The traceback's frames hold tensors, and the error may live for long.
            error.__traceback__ = None
            is_out_of_memory = _is_out_of_memory(error)
            with self._lock:
                self._drop(handles)
                alone = self._scheduler.fail(handles, is_out_of_memory=is_out_of_memory)
            if alone is not None:
                alone.end(self._failure(self._explain(error, alone)))
                return
            logger.warning(
                "%d documents of %d tokens failed (%s: %s); trying again with fewer at once%s",
                len(handles),
                sum(handle.num_tokens for handle in handles),
                type(error).__name__,
                error,
                "; a smaller batch_tokens avoids this" if is_out_of_memory else "",
            )

    def _explain(self, error: BaseException, handle: Handle[R, O]) -> LongformerError:
        """Return what to tell of one document's error; an error of ours speaks for itself."""
        if isinstance(error, LongformerError):
            return error
        explained: LongformerError
        if _is_out_of_memory(error):
            explained = self._does_not_fit(handle.request)
        else:
            explained = LongformerError(f"the model failed with {type(error).__name__}: {error}")
        explained.__cause__ = error
        return explained

    def _tick(self) -> None:
        """Tell those who follow a run that something was computed."""
        self.moved_at = time.monotonic()
        for watcher in list(self._watchers):
            watcher()


def _is_out_of_memory(error: BaseException) -> bool:
    # On the CPU torch reports a failed allocation as a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
