"""Summarization with accidents, for tests: what goes wrong is decided by words in the text.

The accidents happen at the edge of the model (its encoder is called with the document's tokens),
everything of ours around it is real.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.stages import Output
from pipelines.tasks.summarize import Summarize, SummarizeWorker

if TYPE_CHECKING:
    from torch import Tensor  # a process that only tokenizes starts without it


@dataclass(frozen=True, kw_only=True)
class Accident(Summarize):
    """`explode` and `kill` are words: a document that holds one raises, or ends its process.

    `journal` is a directory: every document that a worker begins is noted there, across processes
    and attempts. `slow_s` is added to every document.
    """

    explode: str | None = None
    kill: str | None = None
    journal: str | None = None
    slow_s: float = 0.0

    def load_worker(self, device: str, num_threads: int) -> "AccidentWorker":
        return AccidentWorker(self, device, num_threads)


class AccidentWorker(SummarizeWorker):
    def __init__(self, task: Accident, device: str, num_threads: int) -> None:
        super().__init__(task, device, num_threads)
        self.accident = task
        self.triggers = {
            name: set(self.tokenizer.encode(" " + word)[1:-1])
            for name, word in (("explode", task.explode), ("kill", task.kill))
            if word
        }
        encode = self.model.encode

        def accident_prone(input_ids: "Tensor", layout: Any) -> "Tensor":
            present = set(input_ids.tolist())
            if self.triggers.get("kill") and self.triggers["kill"] <= present:
                os._exit(1)
            if self.triggers.get("explode") and self.triggers["explode"] <= present:
                raise RuntimeError("an exception on this document")
            return encode(input_ids, layout)

        self.model.encode = accident_prone  # type: ignore[method-assign]

    def __call__(
        self, documents: Sequence[tuple[str, Sequence[int]]], on_progress: Callable[[], None]
    ) -> Iterator[tuple[int, Output]]:
        for name, _ in documents:
            self._note(name)
            time.sleep(self.accident.slow_s)
        return super().__call__(documents, on_progress)

    def _note(self, name: str) -> None:
        if self.accident.journal:
            path = os.path.join(self.accident.journal, f"{os.getpid()}.log")
            with open(path, "a", encoding="utf-8") as file:
                file.write(name + "\n")
