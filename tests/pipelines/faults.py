"""Summarization with accidents, for tests: what goes wrong is decided by words in the text.

The accidents happen at the edge of the model (its encoder is called with the document's tokens),
everything of ours around it is real.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tasks.base import Document, Process
from pipelines.tasks.preparation import tokenizer_of
from pipelines.tasks.summarize import Summarize

if TYPE_CHECKING:
    from torch import Tensor  # a process that only tokenizes starts without it


@dataclass(frozen=True)
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

    def load_engine(self, device: str, memory_share: float) -> Any:
        return AccidentProneEngine(self, super().load_engine(device, memory_share))

    def process(self, document: Document) -> Process:
        if self.journal:
            with open(Path(self.journal, f"{os.getpid()}.log"), "a", encoding="utf-8") as file:
                file.write(document.id + "\n")
        time.sleep(self.slow_s)
        return (yield from super().process(document))


class AccidentProneEngine:
    """An engine round whose model the accidents happen."""

    def __init__(self, task: Accident, engine: Any) -> None:
        self.task, self.engine = task, engine
        tokenizer = tokenizer_of(task.model)
        triggers = {
            name: set(tokenizer.encode(" " + word)[1:-1])
            for name, word in (("explode", task.explode), ("kill", task.kill))
            if word
        }
        self.inside: set[int] = set()  # threads
        self.widest = 0
        model = engine._model
        encode, decode_step = model.encode, model.decode_step

        def accident_prone(input_ids: "Tensor", layout: Any) -> "Tensor":
            present = set(input_ids.tolist())
            if triggers.get("kill") and triggers["kill"] <= present:
                self._await_company(layout.num_documents)
                os._exit(1)
            if triggers.get("explode") and triggers["explode"] <= present:
                raise RuntimeError("an exception on this document")
            return encode(input_ids, layout)

        def measured(token_ids: "Tensor", *given: Any) -> "Tensor":
            self._note_width(len(token_ids) // task.generation.num_beams)
            return decode_step(token_ids, *given)

        model.encode, model.decode_step = accident_prone, measured

    def run(
        self, requests: Sequence[Any], on_progress: Callable[[], None]
    ) -> Iterator[tuple[int, Any]]:
        self.inside.add(threading.get_ident())
        try:
            self._await_company(len(requests))
            yield from self.engine.run(requests, on_progress)
        finally:
            self.inside.discard(threading.get_ident())

    def _await_company(self, num_documents: int) -> None:
        deadline = time.monotonic() + self.task.company_s
        while num_documents > 1 and len(self.inside) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)

    def _note_width(self, num_documents: int) -> None:
        if self.task.journal and num_documents > self.widest:
            self.widest = num_documents
            path = Path(self.task.journal, f"{os.getpid()}.widest")
            path.write_text(str(num_documents), encoding="utf-8")
