"""What the API asks of whoever computes: an engine in this process, or replicas elsewhere."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from longformer_core.scheduling.handle import Tokens
from pipelines.tasks.base import Document, Output, Task


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a document of several windows is: `done` of `windows` in a round, from 1."""

    level: int
    done: int
    windows: int


@dataclass(frozen=True, slots=True)
class Overloaded:
    """A document that was not taken: what waits, and when that will be done."""

    queued_tokens: int
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """A document whose replicas died while they computed it."""

    tries: int


# A stream ends with one of these.
Reply = Output | Overloaded | WorkerDied
Event = Tokens | Progress | Output | Overloaded | WorkerDied


class Backend(Protocol):
    """Computes documents. Leaving a call early frees what it held."""

    async def answer(self, task: Task, document: Document, deadline_s: float) -> Reply:
        """Return what becomes of a document, by the engine's deadline at the latest."""
        ...

    def stream(self, task: Task, document: Document, deadline_s: float) -> AsyncGenerator[Event]:
        """Yield tokens as they become certain, or how far the windows are; at last the reply."""
        ...

    async def check(self) -> None:
        """Compute a small document. Raises: RuntimeError if that does not work in time."""
        ...


def num_tokens(document: Document) -> int:
    """Return what a document takes of a budget: the tokens of all its windows."""
    return sum(len(window.input_ids) for window in document.windows)
