"""One document on its way through an engine: what its owner may wait for, hear of, or cancel."""

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)


class DocumentRequest(Protocol):
    """What an engine is asked about one document, as far as scheduling looks at it.

    num_rows: how many rows of the model's batch it takes while it runs.
    kind: what documents must share to be computed together.
    """

    @property
    def input_ids(self) -> Sequence[int]: ...

    @property
    def global_positions(self) -> Sequence[int] | None: ...

    @property
    def valid(self) -> Sequence[bool] | None: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def kind(self) -> Hashable: ...


R = TypeVar("R", bound=DocumentRequest)
O = TypeVar("O")  # noqa: E741 - an outcome
E = TypeVar("E")  # an event


@dataclass(frozen=True, slots=True)
class Tokens:
    """The next tokens of a document's best sequence, as soon as no other can become the best."""

    ids: list[int]


class Handle(Generic[R, O]):
    """A document that was given to an engine. Any thread may wait for it, or cancel it.

    >>> handle = engine.add([0, 31, 7, 2], options, deadline_s=60)
    >>> handle.result(timeout_s=60).error is None
    True
    >>> handle.is_done
    True
    """

    def __init__(
        self,
        request: R,
        deadline_s: float | None = None,
        *,
        on_event: Callable[[Tokens | O], None] | None = None,
        on_end: Callable[[O], None] | None = None,
    ) -> None:
        """See `DocumentEngine.submit`; `on_end` is called with the outcome alone."""
        self.request = request
        self.num_tokens = len(request.input_ids)
        self.num_rows, self.kind = request.num_rows, request.kind
        self.deadline_s = deadline_s
        self.deadline = None if deadline_s is None else time.monotonic() + deadline_s
        self.is_cancelled = False
        # When it was begun first (time.monotonic).
        self.began_at: float | None = None
        self.on_cancel: Callable[[], None] | None = None
        self.is_streamed = on_event is not None
        self._on_event, self._on_end = on_event, on_end
        self._changed = threading.Condition()
        self._certain: list[int] = []
        self._num_read = 0
        self._outcome: O | None = None

    @property
    def is_done(self) -> bool:
        """Return whether the outcome is known."""
        return self._outcome is not None

    def events(self, timeout_s: float | None = None) -> Iterator[Tokens | O]:
        """Yield `Tokens` as they become certain, and at last the outcome.

        With beams a token is certain when all sequences that may still win agree on it. One
        consumer per document; whoever asks late gets everything so far at once, and whoever asks
        again goes on where he was.
        Raises: TimeoutError when nothing came for `timeout_s`; the document goes on.
        """
        self.is_streamed = True
        while True:
            with self._changed:
                if not self._changed.wait_for(
                    lambda: len(self._certain) > self._num_read or self.is_done, timeout_s
                ):
                    raise TimeoutError(f"no token for {timeout_s} s")
                new, outcome = self._certain[self._num_read :], self._outcome
                self._num_read += len(new)
            if new:
                yield Tokens(new)
            if outcome is not None:
                yield outcome
                return

    def result(self, timeout_s: float | None = None) -> O:
        """Wait for the outcome; an error is in it, not raised.

        Raises: TimeoutError when it is not there after `timeout_s`; the document goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_done, timeout_s):
                raise TimeoutError(f"the document is not done after {timeout_s} s")
        assert self._outcome is not None
        return self._outcome

    def cancel(self) -> None:
        """Stop; the outcome will be a CancelledError unless it is there already."""
        self.is_cancelled = True
        if self.on_cancel is not None and not self.is_done:
            self.on_cancel()

    def tell(self, certain: list[int]) -> None:
        """Take note of the tokens that are certain by now (the engine's side).

        A document that was begun again has fewer of them than were told before.
        """
        with self._changed:
            new = certain[len(self._certain) :]
            if new:
                self._certain = certain
                self._changed.notify_all()
        if new and self._on_event is not None:
            self._on_event = _told(self._on_event, Tokens(new))

    def end(self, outcome: O) -> None:
        """Take note of the outcome (the engine's side). The first one counts."""
        with self._changed:
            if self._outcome is not None:
                return
            self._outcome = outcome
            self._changed.notify_all()
        for listener in (self._on_event, self._on_end):
            if listener is not None:
                _told(listener, outcome)


def _told(listener: Callable[[E], None], event: E) -> Callable[[E], None] | None:
    """Tell a caller's listener; return it, or None if it raised, which costs no other document."""
    try:
        listener(event)
    except Exception:
        logger.exception("a listener raised an error; it is not called again")
        return None
    return listener
