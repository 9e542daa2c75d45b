"""Decode documents of any lengths and options together: each comes when there is room, each leaves
when it is done.

One thread steps while there is anything to decode. Documents wait in the order of their arrival,
are encoded a pack at a time, and join those that decode already.
"""

import atexit
import contextlib
import dataclasses
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from longformer_core.attention.global_attention import Form
from longformer_core.errors import (
    CancelledError,
    ConfigError,
    DeadlineError,
    LongformerError,
)
from longformer_core.generation.admission import Plan
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.decode_step import record_cuda_graph
from longformer_core.generation.memory import available_bytes
from longformer_core.generation.request import Generation, Handle, Request
from longformer_core.generation.running_batch import Lane, Model
from longformer_core.ops.cpu.openmp import end_idle_threads

logger = logging.getLogger(__name__)

# Source tokens encoded at once: from a few thousand on a CPU gains nothing from more, and tensors
# above 32 MiB, which glibc asks the system for each time, cost it its pages.
_BATCH_TOKENS = {"cpu": 8192}
_BATCH_TOKENS_ELSEWHERE = 131072
# Rows that step together: the weights' share of a step is small by then.
_MAX_ROWS = 256
# What of the free memory the engine plans with: others take some too.
_MEMORY_SHARE = 0.8


class Engine:
    """Decode documents; a document's text is its own alone, whatever else is decoded beside it.

    Units: `batch_tokens` counts source tokens encoded at once and `max_rows` sequences decoded at
    once (documents times beams); a document beyond either goes alone. `memory_bytes` is what
    documents may take beside the weights; by default most of what is free now.
    Numerics: what is decoded together changes sums in their last bit, as any batching does; a token
    changes only where two scores were equal up to that.
    Failures: when something goes wrong for several documents at once, they are halved until it is
    one document's error; this finds a bad document, and also the size that fits into memory.
    """

    def __init__(
        self,
        model: Model,
        *,
        batch_tokens: int | None = None,
        max_rows: int = _MAX_ROWS,
        memory_bytes: int | None = None,
        form: Form = "auto",
        cuda_graphs: bool = False,
    ) -> None:
        """Keep the model, which the engine alone should use while it decodes.

        form: of the cross-attention's source; see `attention.source.Source`.
        cuda_graphs: on a CUDA device, record a step and replay it while the same documents decode.
        Raises: ConfigError for a budget below 1.
        """
        device = model.device
        self._model, self._form = model, form
        self._record = record_cuda_graph if cuda_graphs and device.type == "cuda" else None
        if memory_bytes is None:
            memory_bytes = int(_MEMORY_SHARE * available_bytes(device))
        if batch_tokens is None:
            batch_tokens = _BATCH_TOKENS.get(device.type, _BATCH_TOKENS_ELSEWHERE)
        budgets = {
            "batch_tokens": batch_tokens, "max_rows": max_rows, "memory_bytes": memory_bytes
        }  # fmt: skip
        for name, value in budgets.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or greater")
        self._batch_tokens, self._max_rows = batch_tokens, max_rows
        self._plan = Plan(model.config, model.dtype, model.device, form, memory_bytes)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        # All that have no outcome yet, wherever they are: whatever happens, each will get one.
        self._open: set[Handle] = set()
        self._waiting: deque[Handle] = deque()
        self._lanes: list[Lane] = []
        # Documents that failed together, and are tried again without anybody else.
        self._suspects: list[list[Handle]] = []
        self._is_trial = False
        self._has_cancelled = False
        self._first_deadline = math.inf
        self._watchers: list[Callable[[], None]] = []
        # Those that loaded the model.
        end_idle_threads()

    def add(
        self,
        input_ids: Sequence[int],
        options: GenerationConfig,
        deadline_s: float | None = None,
        *,
        global_positions: Sequence[int] | None = None,
        seed: int | None = None,
        valid: Sequence[bool] | None = None,
    ) -> Handle:
        """Decode a document as soon as there is room; return at once. Any thread may call this.

        deadline_s: seconds from now after which the outcome is a DeadlineError. The other
            arguments are those of `Request`; what is wrong with them is in the outcome.
        Raises: ConfigError when the model cannot decode with the options.
        """
        request = Request(input_ids, options, global_positions, seed, valid)
        return self.submit(request, deadline_s)

    def submit(self, request: Request, deadline_s: float | None = None) -> Handle:
        """Do what `add` does for a request that is made already."""
        request.options.check(self._model.config)
        handle = Handle(_with_seed(request), deadline_s)
        self._take([handle])
        return handle

    def run(
        self, requests: Sequence[Request], on_progress: Callable[[], None] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """Yield each request's index and outcome, in order of completion.

        Several threads may run documents at once; they are decoded together. Long documents begin
        first. Leaving early cancels what is not done.
        on_progress: called now and then while the documents are decoded; what it raises comes
            through.
        Raises: ConfigError, before any work, when the model cannot decode with some options.
        """
        for options in {request.options for request in requests}:
            options.check(self._model.config)
        return self._run(requests, on_progress)

    def _run(
        self, requests: Sequence[Request], on_progress: Callable[[], None] | None
    ) -> Iterator[tuple[int, Generation]]:
        inbox: queue.SimpleQueue[tuple[int, Generation] | None] = queue.SimpleQueue()
        handles = [
            Handle(_with_seed(request), on_end=lambda out, i=i: inbox.put((i, out)))  # type: ignore[misc]
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

    def _take(self, handles: Sequence[Handle]) -> None:
        """Let documents wait, but for those that cannot be decoded, and see that a thread works."""
        end_idle_threads()
        fitting = []
        for handle in handles:
            handle.on_cancel = self._note_cancel
            error = self._plan.unfit(handle)
            if self._is_stopping:
                error = CancelledError("the program ends, and no document is begun any more")
            if error is None:
                fitting.append(handle)
            else:
                handle.end(Generation([], [], error))
        if not fitting:
            return
        with self._lock:
            self._open.update(fitting)
            self._waiting += fitting
            self._first_deadline = min(self._first_deadline, _first_deadline(fitting))
            if self._thread is None:
                self._start()

    def _start(self) -> None:
        """Start the thread. A program that ends does not wait for texts that nobody will read."""
        thread = threading.Thread(target=self._work, name="longhaul-engine", daemon=True)
        thread.start()
        self._thread = thread
        atexit.register(self._stop)

    def _stop(self) -> None:
        """Stop after this step: a thread that is inside torch aborts the program that ends."""
        self._is_stopping = True
        thread = self._thread
        if thread is not None:
            thread.join()
        self._give_up(CancelledError("the program ended before the document was done"))

    def _note_cancel(self) -> None:
        # A plain store, no lock: a generator that the garbage collector closes may come here from
        # any place, also from one that holds the lock.
        self._has_cancelled = True

    @torch.inference_mode()
    def _work(self) -> None:
        """Admit and step until nothing is left."""
        try:
            if self._model.device.type == "cuda":
                # Each thread has its own current device, where kernels are launched.
                torch.cuda.set_device(self._model.device)
            while self._is_wanted():
                self._dismiss()
                self._admit()
                self._step_all()
        except BaseException as error:
            logger.critical("the engine broke; all its documents fail", exc_info=error)
            self._give_up(error)

    def _is_wanted(self) -> bool:
        with self._lock:
            if not self._is_stopping and (self._waiting or self._lanes or self._suspects):
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
            handles = list(self._open)
            self._open.clear()
            self._waiting.clear()
            self._lanes, self._suspects = [], []
        # The traceback's frames hold tensors, and the error may live for long.
        error.__traceback__ = None
        for handle in handles:
            handle.end(Generation([], [], self._explain(error, handle)))

    def _end(self, handle: Handle, outcome: Generation) -> None:
        with self._lock:
            self._open.discard(handle)
        handle.end(outcome)

    def _dismiss(self) -> None:
        """End the documents that were cancelled or are late, wherever they are."""
        now = time.monotonic()
        if not self._has_cancelled and now <= self._first_deadline:
            return
        # First, so that who is cancelled from now on is seen the next time.
        self._has_cancelled = False
        with self._lock:
            reasons = {handle: _reason_to_end(handle, now) for handle in self._open}
            self._first_deadline = _first_deadline([h for h, e in reasons.items() if e is None])
        for handle, error in reasons.items():
            if error is not None:
                self._end(handle, Generation([], [], error))
        with self._lock:
            self._waiting = deque(_open_ones(self._waiting))
        self._suspects = [pack for pack in map(_open_ones, self._suspects) if pack]
        for lane in list(self._lanes):
            with self._guarded(lane.handles):
                lane.remove({i for i, handle in enumerate(lane.handles) if handle.is_done})
        self._drop_empty_lanes()

    def _admit(self) -> None:
        """Encode the next pack, if there is room for one, and let it join those that decode."""
        pack = self._next_pack()
        if pack:
            with self._guarded(pack):
                new = Lane(self._model, pack, self._form, self._record)
                self._tick()
                self._join(new)

    def _join(self, new: Lane) -> None:
        for lane in self._lanes:
            if lane.kind == new.kind:
                with self._guarded([*lane.handles, *new.handles]):
                    lane.extend(new)
                return
        self._lanes.append(new)

    def _next_pack(self) -> list[Handle]:
        """Return the documents to encode now: suspects alone, the others while budgets last."""
        if not self._lanes:
            self._is_trial = bool(self._suspects)
            if self._suspects:
                group = self._suspects.pop()
                # They may have come in several packs, and failed in one lane.
                pack = self._first_with_room(group)
                self._suspects += [rest for rest in [group[len(pack) :]] if rest]
                return pack
        if self._suspects or self._is_trial:
            return []
        with self._lock:
            pack = self._first_with_room(self._waiting)
            for _ in pack:
                self._waiting.popleft()
        return pack

    def _first_with_room(self, handles: Iterable[Handle]) -> list[Handle]:
        pack: list[Handle] = []
        for handle in handles:
            if not self._has_room(pack, handle):
                break
            pack.append(handle)
        return pack

    def _has_room(self, pack: list[Handle], handle: Handle) -> bool:
        """Return whether a document may be encoded with the pack and decoded with all others."""
        decoding = [other for lane in self._lanes for other in lane.handles]
        if not decoding and not pack:
            return True
        if pack and pack[0].kind != handle.kind:
            return False
        new = [*pack, handle]
        return (
            (not pack or sum(h.num_tokens for h in new) <= self._batch_tokens)
            and sum(h.num_rows for h in (*decoding, *new)) <= self._max_rows
            and self._plan.num_bytes(new, decoding) <= self._plan.memory_bytes
        )

    def _step_all(self) -> None:
        """Extend every document by one token; those that are done leave."""
        for lane in list(self._lanes):
            done: list[tuple[Handle, Generation]] = []
            with self._guarded(lane.handles):
                done = lane.step()
            self._tick()
            for handle, outcome in done:
                self._end(handle, outcome)
        self._drop_empty_lanes()

    def _drop_empty_lanes(self) -> None:
        self._lanes = [lane for lane in self._lanes if lane.handles]

    @contextlib.contextmanager
    def _guarded(self, handles: Sequence[Handle]) -> Iterator[None]:
        """Let what goes wrong be an error of these documents; their lanes are lost with it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - any error is some document's until shown otherwise
            lost = set(handles)
            self._lanes = [lane for lane in self._lanes if lost.isdisjoint(lane.handles)]
            self._failed(_open_ones(handles), error)

    def _failed(self, handles: list[Handle], error: Exception) -> None:
        """Try documents that failed together again in halves; one alone has its error."""
        if not handles:
            return
        logger.debug("decoding %d documents failed", len(handles), exc_info=error)
        # The traceback's frames hold tensors, and the error may live for long.
        error.__traceback__ = None
        is_out_of_memory = _is_out_of_memory(error)
        # Memory may be lacking because of those that decode beside it.
        is_alone = len(handles) == 1 and not (is_out_of_memory and self._lanes)
        if is_alone:
            self._end(handles[0], Generation([], [], self._explain(error, handles[0])))
            return
        logger.warning(
            "decoding %d documents of %d tokens failed (%s: %s); trying again with fewer at once%s",
            len(handles),
            sum(handle.num_tokens for handle in handles),
            type(error).__name__,
            error,
            "; a smaller batch_tokens avoids this" if is_out_of_memory else "",
        )
        middle = len(handles) // 2
        self._suspects += [half for half in (handles[middle:], handles[:middle]) if half]

    def _explain(self, error: BaseException, handle: Handle) -> LongformerError:
        """Return what to tell of one document's error; an error of ours speaks for itself."""
        if isinstance(error, LongformerError):
            return error
        explained: LongformerError
        if _is_out_of_memory(error):
            explained = self._plan.does_not_fit(handle)
        else:
            explained = LongformerError(f"decoding failed with {type(error).__name__}: {error}")
        explained.__cause__ = error
        return explained

    def _tick(self) -> None:
        for watcher in list(self._watchers):
            watcher()


def _with_seed(request: Request) -> Request:
    """Draw the seed that is missing once, so that a document that begins again says the same."""
    if request.seed is not None or not request.options.do_sample:
        return request
    return dataclasses.replace(request, seed=torch.Generator().seed() & (2**63 - 1))


def _reason_to_end(handle: Handle, now: float) -> LongformerError | None:
    if handle.is_cancelled:
        return CancelledError("the document was cancelled before it was done")
    if handle.deadline is not None and now > handle.deadline:
        return DeadlineError(
            f"the document was not done after {handle.deadline_s:g} s; allow more, or ask for less"
        )
    return None


def _open_ones(handles: Iterable[Handle]) -> list[Handle]:
    return [handle for handle in handles if not handle.is_done]


def _is_out_of_memory(error: BaseException) -> bool:
    # On the CPU torch reports a failed allocation as a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _first_deadline(handles: Sequence[Handle]) -> float:
    deadlines = (handle.deadline for handle in handles if handle.deadline is not None)
    return min(deadlines, default=math.inf)
