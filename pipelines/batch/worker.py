"""The one worker of all tasks: an engine, and the documents that it is asked about."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pipelines.tasks.base import Document, Output, Task, advance


class Worker:
    """A task's model in an engine. It stays loaded, and several threads call it at once."""

    def __init__(self, task: Task, device: str, num_threads: int, memory_share: float) -> None:
        """Load the model; documents may take `memory_share` of what is then free on the device."""
        if device == "cpu":
            import torch

            # Ray sets OMP_NUM_THREADS from the logical CPUs it was asked for, which say nothing
            # about how many cores this worker has to itself.
            torch.set_num_threads(num_threads)
        self.task = task
        self.engine = task.load_engine(device, memory_share)

    def __call__(
        self, documents: Sequence[Document], on_progress: Callable[[], None]
    ) -> Iterator[tuple[int, Output]]:
        """Yield each document's index and output, in order of completion.

        Documents that ask again, with what they were answered, do so together, in rounds.
        """
        processes = [self.task.process(document) for document in documents]
        ready: Iterable[tuple[int, Any]] = [(index, None) for index in range(len(processes))]
        while True:
            asked: dict[int, list[Any]] = {}
            for index, results in ready:
                answer = advance(processes[index], results)
                if isinstance(answer, Output):
                    yield index, answer
                else:
                    asked[index] = answer
            if not asked:
                return
            ready = self._ask(asked, on_progress)

    def _ask(
        self, asked: dict[int, list[Any]], on_progress: Callable[[], None]
    ) -> Iterator[tuple[int, list[Any]]]:
        """Yield the index of a document and the results of all its requests."""
        flat = [(index, place) for index, all_of in asked.items() for place in range(len(all_of))]
        requests = [asked[index][place] for index, place in flat]
        results: dict[int, list[Any]] = {i: [None] * len(all_of) for i, all_of in asked.items()}
        left = {index: len(all_of) for index, all_of in asked.items()}
        for number, result in self.engine.run(requests, on_progress):
            index, place = flat[number]
            results[index][place] = result
            left[index] -= 1
            if not left[index]:
                yield index, results.pop(index)
