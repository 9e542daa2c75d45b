"""Which documents are computed next, which are tried again after a failure, and which end early."""

import math
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from longformer_core.errors import CancelledError, ConfigError, DeadlineError, LongformerError


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine has to do: documents that wait, and those that it computes now."""

    waiting_documents: int
    waiting_tokens: int
    running_documents: int
    running_tokens: int


class Document(Protocol):
    """What is known of a document; see `Handle`."""

    num_tokens: int
    num_rows: int
    kind: Hashable
    deadline: float | None
    deadline_s: float | None
    is_cancelled: bool


D = TypeVar("D", bound=Document)


class Scheduler(Generic[D]):
    """Let documents wait until the budgets have room for them, and keep count of all of them.

    A document waits, runs, or is a suspect: one of several that failed together. Suspects are tried
    again in halves, each without anybody else, until one is left that fails alone: this finds a bad
    document, and also the size that fits into memory.
    It computes nothing and has neither thread nor clock: its owner calls one method at a time, and
    computes the packs that it is given. Only `note_cancel` may be called at any time.
    Units: `batch_tokens` counts tokens of one pack, `max_rows` rows that run at once; a document
        beyond either goes alone. `num_bytes(pack, running)` is what a pack and those beside it take
        of `memory_bytes`.
    """

    def __init__(
        self,
        *,
        batch_tokens: int,
        max_rows: int | None,
        memory_bytes: int,
        num_bytes: Callable[[Sequence[D], Sequence[D]], int],
    ) -> None:
        """Begin without documents. Raises: ConfigError for a budget below 1."""
        budgets = {
            "batch_tokens": batch_tokens, "max_rows": max_rows, "memory_bytes": memory_bytes
        }  # fmt: skip
        for name, value in budgets.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or greater")
        self._batch_tokens, self._memory_bytes = batch_tokens, memory_bytes
        self._max_rows = math.inf if max_rows is None else max_rows
        self._num_bytes = num_bytes
        self._waiting: deque[D] = deque()
        self._suspects: list[list[D]] = []
        # In the order of their start.
        self._running: dict[D, None] = {}
        self._is_trial = False
        self._has_cancelled = False
        self._first_deadline = math.inf

    @property
    def is_idle(self) -> bool:
        """Return whether every document that was added has left again."""
        return not (self._waiting or self._running or self._suspects)

    def load(self) -> Load:
        """Count the documents and their tokens."""
        waiting = [*self._waiting, *(one for group in self._suspects for one in group)]
        return Load(
            len(waiting), _num_tokens(waiting), len(self._running), _num_tokens(self._running)
        )

    def add(self, documents: Iterable[D]) -> None:
        """Let documents wait behind those that wait already."""
        for document in documents:
            self._waiting.append(document)
            self._note_deadline(document)

    def next_pack(self) -> list[D]:
        """Return the documents to begin now, which run from now on: none when there is no room."""
        if not self._running:
            self._is_trial = bool(self._suspects)
            if self._suspects:
                group = self._suspects.pop()
                # They may have come in several packs, and failed where these had become one batch.
                pack = self._first_that_fit(group)
                if len(pack) < len(group):
                    self._suspects.append(group[len(pack) :])
                self._running = dict.fromkeys(pack)
                return pack
        if self._suspects or self._is_trial:
            return []
        pack = self._first_that_fit(self._waiting)
        for document in pack:
            self._waiting.popleft()
            self._running[document] = None
        return pack

    def finish(self, document: D) -> None:
        """Forget a document that ran and has a result."""
        del self._running[document]

    def fail(self, documents: Collection[D], *, is_out_of_memory: bool) -> D | None:
        """Try those of the documents that run again, in halves; return one that failed alone.

        That one is forgotten. One that lacked memory while others ran is tried alone first.
        """
        failed = [document for document in documents if document in self._running]
        for document in failed:
            del self._running[document]
        if len(failed) == 1 and not (is_out_of_memory and self._running):
            return failed[0]
        middle = len(failed) // 2
        self._suspects += [half for half in (failed[middle:], failed[:middle]) if half]
        return None

    def note_cancel(self) -> None:
        """Let the next `expire` look for a document that was cancelled.

        A plain store, no lock: a generator that the garbage collector closes may come here from
        any place, also from one that holds its owner's lock.
        """
        self._has_cancelled = True

    def expire(self, now: float) -> list[tuple[D, LongformerError]]:
        """Forget the documents that were cancelled or are late, wherever they are; say why."""
        if not self._has_cancelled and now <= self._first_deadline:
            return []
        # First, so that who is cancelled from now on is seen the next time.
        self._has_cancelled = False
        self._first_deadline = math.inf
        expired = []
        for document in self._all():
            error = _reason_to_end(document, now)
            if error is None:
                self._note_deadline(document)
            else:
                expired.append((document, error))
        gone = {document for document, _ in expired}
        self._waiting = deque(document for document in self._waiting if document not in gone)
        suspects = [[one for one in group if one not in gone] for group in self._suspects]
        self._suspects = [group for group in suspects if group]
        self._running = {document: None for document in self._running if document not in gone}
        return expired

    def clear(self) -> list[D]:
        """Forget all documents; return them."""
        documents = self._all()
        self._waiting.clear()
        self._suspects, self._running = [], {}
        return documents

    def _all(self) -> list[D]:
        suspects = (document for group in self._suspects for document in group)
        return [*self._running, *suspects, *self._waiting]

    def _note_deadline(self, document: D) -> None:
        if document.deadline is not None:
            self._first_deadline = min(self._first_deadline, document.deadline)

    def _first_that_fit(self, documents: Iterable[D]) -> list[D]:
        """Return documents from the first on, of one kind, while the budgets last."""
        running, pack = list(self._running), list[D]()
        num_tokens, num_rows = 0, sum(document.num_rows for document in running)
        for document in documents:
            num_tokens += document.num_tokens
            num_rows += document.num_rows
            if (running or pack) and not (
                (not pack or document.kind == pack[0].kind)
                and (not pack or num_tokens <= self._batch_tokens)
                and num_rows <= self._max_rows
                and self._num_bytes([*pack, document], running) <= self._memory_bytes
            ):
                break
            pack.append(document)
        return pack


def _num_tokens(documents: Iterable[Document]) -> int:
    return sum(document.num_tokens for document in documents)


def _reason_to_end(document: Document, now: float) -> LongformerError | None:
    if document.is_cancelled:
        return CancelledError("the document was cancelled before it was done")
    if document.deadline is not None and now > document.deadline:
        return DeadlineError(
            f"the document was not done after {document.deadline_s:g} s; allow more, or ask for "
            "less"
        )
    return None
