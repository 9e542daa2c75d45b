"""Summarization with accidents, for tests: what goes wrong is decided by words in the text.

The accidents happen at the edge of the model (its encoder is called with the document's tokens),
everything of ours around it is real.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.tasks.base import Output
from pipelines.tasks.summarize import Summarize, SummarizeWorker

if TYPE_CHECKING:
    from torch import Tensor  # a process that only tokenizes starts without it


@dataclass(frozen=True, kw_only=True)
class Accident(Summarize):
    """`explode` and `kill` are words: a document that holds one raises, or ends its process.

    `journal` is a directory: every document that a worker begins is noted there, across processes
    and attempts, and the most documents that stepped together. `slow_s` is added to every document.
    For `company_s` several documents wait for another block in the same process.
    """

    explode: str | None = None
    kill: str | None = None
    journal: str | None = None
    slow_s: float = 0.0
    company_s: float = 0.0

    def load_worker(self, device: str, num_threads: int, memory_share: float) -> "AccidentWorker":
        return AccidentWorker(self, device, num_threads, memory_share)


class AccidentWorker(SummarizeWorker):
    def __init__(self, task: Accident, device: str, num_threads: int, memory_share: float) -> None:
        super().__init__(task, device, num_threads, memory_share)
        self.accident = task
        self.triggers = {
            name: set(self.tokenizer.encode(" " + word)[1:-1])
            for name, word in (("explode", task.explode), ("kill", task.kill))
            if word
        }
        self.inside: set[int] = set()  # threads
        self.widest = 0
        encode, decode_step = self.model.encode, self.model.decode_step

        def accident_prone(input_ids: "Tensor", layout: Any) -> "Tensor":
            present = set(input_ids.tolist())
            if self.triggers.get("kill") and self.triggers["kill"] <= present:
                self._await_company(layout.num_documents)
                os._exit(1)
            if self.triggers.get("explode") and self.triggers["explode"] <= present:
                raise RuntimeError("an exception on this document")
            return encode(input_ids, layout)

        def measured(token_ids: "Tensor", *given: Any) -> "Tensor":
            self._note_width(len(token_ids) // task.generation.num_beams)
            return decode_step(token_ids, *given)

        self.model.encode = accident_prone  # type: ignore[method-assign]
        self.model.decode_step = measured  # type: ignore[method-assign]

    def __call__(
        self, documents: Sequence[tuple[str, Sequence[int]]], on_progress: Callable[[], None]
    ) -> Iterator[tuple[int, Output]]:
        for name, _ in documents:
            self._note(name)
            time.sleep(self.accident.slow_s)
        self.inside.add(threading.get_ident())
        try:
            self._await_company(len(documents))
            yield from super().__call__(documents, on_progress)
        finally:
            self.inside.discard(threading.get_ident())

    def _await_company(self, num_documents: int) -> None:
        deadline = time.monotonic() + self.accident.company_s
        while num_documents > 1 and len(self.inside) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)

    def _note(self, name: str) -> None:
        if self.accident.journal:
            path = os.path.join(self.accident.journal, f"{os.getpid()}.log")
            with open(path, "a", encoding="utf-8") as file:
                file.write(name + "\n")

    def _note_width(self, num_documents: int) -> None:
        if self.accident.journal and num_documents > self.widest:
            self.widest = num_documents
            path = os.path.join(self.accident.journal, f"{os.getpid()}.widest")
            with open(path, "w", encoding="utf-8") as file:
                file.write(str(num_documents))
