"""One document on its way through the engine: what is asked, and what becomes of it."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from longformer_core.errors import LongformerError
from longformer_core.generation.config import GenerationConfig


@dataclass(frozen=True, slots=True)
class Request:
    """One document to decode.

    global_positions: the tokens that attend to everything; None takes the package's default.
    seed: what sampling starts from; None draws a fresh one.
    valid: a flag per token, False for one that keeps its place but that nothing attends to.
    """

    input_ids: Sequence[int]
    options: GenerationConfig
    global_positions: Sequence[int] | None = None
    seed: int | None = None
    valid: Sequence[bool] | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What became of one document: its sequences, or the error that kept it from having any.

    sequences: generated ids, best first, without start token and padding; an end token is kept.
    scores: summed log-probability / length ** length_penalty, one per sequence.
    step_scores: [steps, rows, vocabulary] on the CPU, and beam_indices, the row that each token of
        each sequence was added to; both only with the option `output_scores`.
    """

    sequences: list[list[int]]
    scores: list[float]
    error: LongformerError | None = None
    step_scores: Tensor | None = None
    beam_indices: list[list[int]] | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """The next tokens of a document's best sequence, as soon as no other can become the best."""

    ids: list[int]


Event = Tokens | Generation


class Handle:
    """A document that was given to an engine. Any thread may wait for it, or cancel it."""

    def __init__(
        self,
        request: Request,
        deadline_s: float | None = None,
        on_end: Callable[[Generation], None] | None = None,
    ) -> None:
        """See `Engine.add`; `on_end` is called with the outcome, by the engine's thread."""
        self.request = request
        self.num_tokens = len(request.input_ids)
        self.num_rows = request.options.rows_per_document
        # What documents must share to step together: how many rows, and what rows are.
        self.kind = (self.num_rows, request.options.prompt_lookup_num_tokens is not None)
        self.started = time.monotonic()
        self.deadline = None if deadline_s is None else self.started + deadline_s
        self.is_cancelled = False
        self.on_cancel: Callable[[], None] | None = None
        self.is_streamed = False
        self._num_told = 0
        self._is_told = False
        self._lock = threading.Lock()
        self._on_end = on_end
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._outcome: Generation | None = None

    @property
    def is_done(self) -> bool:
        """Return whether the outcome is known."""
        return self._ended.is_set()

    def events(self, timeout_s: float | None = None) -> Iterator[Event]:
        """Yield `Tokens` as they become certain, and at last the `Generation`.

        With beams a token is certain when all sequences that may still win agree on it. One
        consumer per document; whoever asks late gets everything so far at once.
        Raises: TimeoutError when nothing came for `timeout_s`.
        """
        with self._lock:
            self.is_streamed = True
            self._tell_outcome()
        while True:
            try:
                event = self._events.get(timeout=timeout_s)
            except queue.Empty:
                raise TimeoutError(f"no token for {timeout_s} s") from None
            yield event
            if isinstance(event, Generation):
                return

    def result(self, timeout_s: float | None = None) -> Generation:
        """Wait for the outcome; an error is in it, not raised.

        Raises: TimeoutError when it is not there after `timeout_s`; the document goes on.
        """
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"the document is not done after {timeout_s} s")
        assert self._outcome is not None
        return self._outcome

    def cancel(self) -> None:
        """Stop decoding; the outcome will be a CancelledError unless it is there already."""
        self.is_cancelled = True
        if self.on_cancel is not None and not self.is_done:
            self.on_cancel()

    def tell(self, certain: list[int]) -> None:
        """Send what is new of the tokens that are certain (the engine's side)."""
        if len(certain) > self._num_told:
            self._events.put(Tokens(certain[self._num_told :]))
            self._num_told = len(certain)

    def end(self, outcome: Generation) -> None:
        """Send the outcome (the engine's side)."""
        with self._lock:
            self._outcome = outcome
            self._ended.set()
            self._tell_outcome()
        if self._on_end is not None:
            self._on_end(outcome)

    def _tell_outcome(self) -> None:
        """Send what is left and the outcome, once there is one and somebody who listens."""
        if self._outcome is None or not self.is_streamed or self._is_told:
            return
        self._is_told = True
        self.tell(self._outcome.sequences[0] if self._outcome.sequences else [])
        self._events.put(self._outcome)
