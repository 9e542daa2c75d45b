"""The contract of a task, shared by batch inference, training and serving."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from pipelines.storage import Location


@dataclass(frozen=True)
class Encoded:
    """A tokenizer's answer for a run of texts, one entry per text."""

    input_ids: pa.Array  # large_list<int32>, null where `errors` is not
    num_tokens_in: pa.Array
    num_windows: pa.Array
    truncated: pa.Array
    coverage: pa.Array
    errors: list[dict[str, str] | None]


@dataclass(frozen=True)
class Output:
    """A model's answer for one document: the task's columns, or the error that took their place."""

    columns: dict[str, Any]
    num_tokens_out: int | None = None
    error: Exception | None = None


class Encoder(Protocol):
    def __call__(self, texts: pa.ChunkedArray) -> Encoded: ...


class Worker(Protocol):
    """A loaded model. It stays loaded between blocks, and several threads call it at once."""

    def __call__(
        self, documents: Sequence[tuple[str, Sequence[int]]], on_progress: Callable[[], None]
    ) -> Iterator[tuple[int, Output]]:
        """Run (id, token ids) documents; yield (index, output) in any order."""
        ...


class Task(Protocol):
    """What turns a text into columns. One file per task in `pipelines/tasks`."""

    name: str
    columns: pa.Schema

    def load_encoder(self) -> Encoder: ...

    def load_worker(self, device: str, num_threads: int, memory_share: float) -> Worker:
        """Load the model; documents may take `memory_share` of what is then free on the device."""
        ...

    def locations(self) -> list[Location]:
        """Local paths that every node must see."""
        ...

    def worker_memory_bytes(self) -> int: ...
