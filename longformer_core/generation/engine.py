"""Decode documents of any lengths and options together: each comes when there is room, each leaves
when it is done.

One thread steps while there is anything to decode. Documents wait in the order of their arrival,
are encoded a pack at a time, and join those that decode already.
"""

import dataclasses
import itertools
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from longformer_core.attention.rows import Form
from longformer_core.errors import (
    CancelledError,
    ConfigError,
    DeadlineError,
    LongformerError,
    OutOfMemoryError,
    ShapeError,
    TooLongError,
)
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.handle import Generation, Handle, Request
from longformer_core.generation.lane import Lane, Model
from longformer_core.memory import available_bytes, decoding_numbers, encoding_numbers

logger = logging.getLogger(__name__)

# Source tokens encoded at once: from a few thousand on a CPU gains nothing from more.
_BATCH_TOKENS = {"cpu": 16384}
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
    ) -> None:
        """Keep the model, which the engine alone should use while it decodes.

        form: of the cross-attention's source; see `attention.source.Source`.
        Raises: ConfigError for a budget below 1.
        """
        device = model.device
        self._model, self._form = model, form
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
        self._batch_tokens, self._max_rows, self._memory_bytes = budgets.values()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._waiting: deque[Handle] = deque()
        self._lanes: list[Lane] = []
        # Documents that failed together, and are tried again without anybody else.
        self._suspects: list[list[Handle]] = []
        self._is_trial = False
        # When some document has to go: at its deadline, or at once when it was cancelled.
        self._sweep_at = math.inf
        self._watchers: list[Callable[[], None]] = []

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
        options.check(self._model.config)
        request = Request(input_ids, options, global_positions, seed, valid)
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
        self._watchers.append(watcher)
        try:
            self._take(sorted(handles, key=lambda handle: -handle.num_tokens))
            left = len(handles)
            while left:
                found = inbox.get()
                if found is not None:
                    left -= 1
                    yield found
                elif on_progress is not None:
                    on_progress()
        finally:
            self._watchers.remove(watcher)
            for handle in handles:
                if not handle.is_done:
                    handle.cancel()

    def _take(self, handles: Sequence[Handle]) -> None:
        """Let documents wait, but for those that cannot be decoded, and see that a thread works."""
        fitting = []
        for handle in handles:
            handle.on_cancel = self._sweep_soon
            error = self._unfit(handle)
            if error is None:
                fitting.append(handle)
            else:
                handle.end(Generation([], [], error))
        if not fitting:
            return
        with self._lock:
            self._waiting += fitting
            self._sweep_at = min(self._sweep_at, _first_deadline(fitting))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="longhaul-engine")
                # A program that ends does not wait for texts that nobody will read.
                self._thread.daemon = True
                self._thread.start()

    def _unfit(self, handle: Handle) -> LongformerError | None:
        request, config = handle.request, self._model.config
        limit = config.max_encoder_position_embeddings
        if handle.num_tokens == 0:
            return ShapeError("the document has no tokens; give at least one")
        if handle.num_tokens > limit:
            return TooLongError(
                f"the document has {handle.num_tokens} tokens but the encoder has {limit} "
                "positions; shorten it or choose a model with more positions"
            )
        ids = torch.as_tensor(request.input_ids)
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= config.vocab_size:
            return ShapeError(
                f"the document's token ids reach from {least} to {most}; they must be from 0 to "
                f"{config.vocab_size - 1}"
            )
        positions = request.global_positions or ()
        if not all(0 <= position < handle.num_tokens for position in positions):
            return ShapeError(
                f"global_positions are {list(positions)} but the document has {handle.num_tokens} "
                "tokens, counted from 0"
            )
        if request.valid is not None and len(request.valid) != handle.num_tokens:
            return ShapeError(
                f"valid has {len(request.valid)} flags but the document has {handle.num_tokens} "
                "tokens; give one for each"
            )
        if self._bytes([handle]) > self._memory_bytes:
            return self._does_not_fit(handle)
        return None

    def _bytes(self, pack: Sequence[Handle]) -> int:
        """Return what documents need beside the weights, at most: to be encoded, and then held."""
        config = self._model.config
        num_tokens = sum(handle.num_tokens for handle in pack)
        numbers = encoding_numbers(config.d_model, config.encoder_ffn_dim, num_tokens)
        return numbers * self._model.dtype.itemsize + sum(map(self._held_bytes, pack))

    def _held_bytes(self, handle: Handle) -> int:
        numbers = decoding_numbers(
            self._model.config,
            handle.num_tokens,
            handle.num_rows,
            handle.request.options.total_length - 1,
            form=self._form,
        )
        return numbers * self._model.dtype.itemsize

    @torch.inference_mode()
    def _work(self) -> None:
        """Admit and step until nothing is left."""
        try:
            while self._is_wanted():
                self._dismiss()
                self._admit()
                self._step_all()
        except BaseException as error:
            self._give_up(error)
            raise

    def _is_wanted(self) -> bool:
        with self._lock:
            if self._waiting or self._lanes or self._suspects:
                return True
            self._thread = None
            return False

    def _give_up(self, error: BaseException) -> None:
        """Tell everybody who waits that the engine itself broke."""
        with self._lock:
            self._thread = None
            handles = [*self._waiting, *itertools.chain(*self._suspects)]
            handles += [handle for lane in self._lanes for handle in lane.handles]
            self._waiting.clear()
            self._lanes, self._suspects = [], []
        for handle in handles:
            handle.end(Generation([], [], self._explain(error, handle)))

    def _dismiss(self) -> None:
        """End the documents that were cancelled or are late, whether they decode or wait."""
        now = time.monotonic()
        if now < self._sweep_at:
            return
        with self._lock:
            self._sweep_at = math.inf
        for lane in self._lanes:
            reasons = {i: _reason_to_end(handle, now) for i, handle in enumerate(lane.handles)}
            gone = {i: Generation([], [], e) for i, e in reasons.items() if e is not None}
            for place, outcome in gone.items():
                lane.handles[place].end(outcome)
            lane.remove(gone)
        self._lanes = [lane for lane in self._lanes if lane.handles]
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
            for handle in waiting:
                error = _reason_to_end(handle, now)
                if error is None:
                    self._waiting.append(handle)
                else:
                    handle.end(Generation([], [], error))
            decoding = [handle for lane in self._lanes for handle in lane.handles]
            first = _first_deadline([*decoding, *self._waiting])
            self._sweep_at = min(self._sweep_at, first)

    def _sweep_soon(self) -> None:
        self._sweep_at = -math.inf

    def _admit(self) -> None:
        """Encode the next pack, if there is room for one, and let it join those that decode."""
        pack = self._next_pack()
        if not pack:
            return
        try:
            lane = Lane(self._model, pack, self._form)
        except Exception as error:  # noqa: BLE001 - any error is some document's until shown otherwise
            self._failed(pack, error)
            return
        self._tick()
        for other in self._lanes:
            if other.num_rows_each == lane.num_rows_each:
                other.extend(lane)
                return
        self._lanes.append(lane)

    def _next_pack(self) -> list[Handle]:
        """Return the documents to encode now: suspects alone, the others while budgets last."""
        if not self._lanes:
            self._is_trial = bool(self._suspects)
            if self._suspects:
                return self._suspects.pop()
        if self._suspects or self._is_trial:
            return []
        pack: list[Handle] = []
        with self._lock:
            while self._waiting and self._has_room(pack, self._waiting[0]):
                pack.append(self._waiting.popleft())
        return pack

    def _has_room(self, pack: list[Handle], handle: Handle) -> bool:
        """Return whether a document may be encoded with the pack and decoded with all others."""
        decoding = [other for lane in self._lanes for other in lane.handles]
        if not decoding and not pack:
            return True
        if pack and pack[0].num_rows != handle.num_rows:
            return False
        new = [*pack, handle]
        held = sum(map(self._held_bytes, decoding))
        return (
            (not pack or sum(h.num_tokens for h in new) <= self._batch_tokens)
            and sum(h.num_rows for h in (*decoding, *new)) <= self._max_rows
            and held + self._bytes(new) <= self._memory_bytes
        )

    def _step_all(self) -> None:
        for lane in list(self._lanes):
            self._step(lane)

    def _step(self, lane: Lane) -> None:
        """Extend a lane's documents by one token; those that are done leave it."""
        try:
            done = lane.step()
        except Exception as error:  # noqa: BLE001 - as above
            self._lanes.remove(lane)
            self._failed(lane.handles, error)
            return
        if not lane.handles:
            self._lanes.remove(lane)
        self._tick()
        for handle, outcome in done:
            handle.end(outcome)

    def _failed(self, handles: list[Handle], error: Exception) -> None:
        """Try documents that failed together again in halves; one alone has its error."""
        logger.debug("decoding %d documents failed", len(handles), exc_info=error)
        # The traceback's frames hold tensors, and the error may live for long.
        error.__traceback__ = None
        if len(handles) == 1:
            handles[0].end(Generation([], [], self._explain(error, handles[0])))
            return
        logger.warning(
            "decoding %d documents of %d tokens together failed (%s: %s); trying again in halves%s",
            len(handles),
            sum(handle.num_tokens for handle in handles),
            type(error).__name__,
            error,
            "; a smaller batch_tokens avoids this" if _is_out_of_memory(error) else "",
        )
        middle = len(handles) // 2
        self._suspects += [handles[middle:], handles[:middle]]

    def _explain(self, error: BaseException, handle: Handle) -> LongformerError:
        """Return what to tell of one document's error; an error of ours speaks for itself."""
        if isinstance(error, LongformerError):
            return error
        explained: LongformerError
        if _is_out_of_memory(error):
            explained = self._does_not_fit(handle)
        else:
            explained = LongformerError(f"decoding failed with {type(error).__name__}: {error}")
        explained.__cause__ = error
        return explained

    def _does_not_fit(self, handle: Handle) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"a document of {handle.num_tokens} tokens with {handle.num_rows} rows of up to "
            f"{handle.request.options.total_length - 1} tokens does not fit into memory even "
            f"alone: it needs about {self._bytes([handle]) / 1e9:.3g} GB beside the weights, of "
            f"{self._memory_bytes / 1e9:.3g} GB; shorten it, lower num_beams, or use a larger "
            "device"
        )

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
            f"the document was not done after {handle.deadline - handle.started:g} s; allow more, "
            "or ask for less"
        )
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    # On the CPU torch reports a failed allocation as a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _first_deadline(handles: Sequence[Handle]) -> float:
    deadlines = (handle.deadline for handle in handles if handle.deadline is not None)
    return min(deadlines, default=math.inf)
