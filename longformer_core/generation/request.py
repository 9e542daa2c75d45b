"""One document on its way through the engine: what is asked, and what becomes of it."""

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
        # How many tokens a row has written when its last one is read off the logits.
        self.num_steps = request.options.total_length - 1
        self.deadline_s = deadline_s
        self.deadline = None if deadline_s is None else time.monotonic() + deadline_s
        self.is_cancelled = False
        self.on_cancel: Callable[[], None] | None = None
        self.is_streamed = False
        self._on_end = on_end
        self._changed = threading.Condition()
        self._certain: list[int] = []
        self._num_read = 0
        self._outcome: Generation | None = None

    @property
    def is_done(self) -> bool:
        """Return whether the outcome is known."""
        return self._outcome is not None

    def events(self, timeout_s: float | None = None) -> Iterator[Event]:
        """Yield `Tokens` as they become certain, and at last the `Generation`.

        With beams a token is certain when all sequences that may still win agree on it. One
        consumer per document; whoever asks late gets everything so far at once, and whoever asks
        again goes on where he was.
        Raises: TimeoutError when nothing came for `timeout_s`; the document goes on.
        """
        self.is_streamed = True
        while True:
            with self._changed:
                if not self._changed.wait_for(self._has_news, timeout_s):
                    raise TimeoutError(f"no token for {timeout_s} s")
                new, outcome = self._certain[self._num_read :], self._outcome
                self._num_read += len(new)
            if new:
                yield Tokens(new)
            if outcome is not None:
                yield outcome
                return

    def result(self, timeout_s: float | None = None) -> Generation:
        """Wait for the outcome; an error is in it, not raised.

        Raises: TimeoutError when it is not there after `timeout_s`; the document goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_done, timeout_s):
                raise TimeoutError(f"the document is not done after {timeout_s} s")
        assert self._outcome is not None
        return self._outcome

    def cancel(self) -> None:
        """Stop decoding; the outcome will be a CancelledError unless it is there already."""
        self.is_cancelled = True
        if self.on_cancel is not None and not self.is_done:
            self.on_cancel()

    def tell(self, certain: list[int]) -> None:
        """Take note of the tokens that are certain by now (the engine's side).

        A document that was begun again has fewer of them than were told before.
        """
        with self._changed:
            if len(certain) > len(self._certain):
                self._certain = certain
                self._changed.notify_all()

    def end(self, outcome: Generation) -> None:
        """Take note of the outcome (the engine's side). The first one counts."""
        with self._changed:
            if self._outcome is not None:
                return
            if outcome.sequences:
                self.tell(outcome.sequences[0])
            self._outcome = outcome
            self._changed.notify_all()
        if self._on_end is not None:
            self._on_end(outcome)

    def _has_news(self) -> bool:
        return len(self._certain) > self._num_read or self.is_done
