"""The worker: documents ask an engine in rounds, each its own, and fail alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pipelines.batch.worker import Worker
from pipelines.tasks.base import Document, Output, Process


@dataclass(frozen=True)
class Result:
    value: int
    error: Exception | None = None


class Halving:
    """A task that asks for the half of its numbers until they are all 1.

    A document is named by its numbers. Its engine answers from the last request to the first, and
    fails on 13.
    """

    def __init__(self) -> None:
        self.rounds: list[list[int]] = []
        self.ended: list[str] = []

    def load_engine(self, device: str, memory_share: float) -> "Halving":
        assert (device, memory_share) == ("cpu", 0.25)
        return self

    def process(self, document: Document) -> Process:
        numbers = [int(word) for word in document.id.split()]
        asked = 0
        try:
            while max(numbers) > 1 or not asked:
                results = yield numbers
                numbers = [result.value for result in results]
                asked += 1
            return Output({"asked": asked, "numbers": numbers})
        finally:
            self.ended.append(document.id)

    def run(
        self, requests: Sequence[int], on_progress: Callable[[], None]
    ) -> Iterator[tuple[int, Result]]:
        self.rounds.append(list(requests))
        for index in reversed(range(len(requests))):
            on_progress()
            error = ValueError("thirteen") if requests[index] == 13 else None
            yield index, Result(max(1, requests[index] // 2), error)


@pytest.fixture
def task() -> Halving:
    return Halving()


def ask(task: Halving, *names: str) -> list[tuple[str, Output]]:
    worker: Any = Worker(task, "cpu", torch.get_num_threads(), 0.25)  # type: ignore[arg-type]
    found = worker([Document(name, []) for name in names], lambda: None)
    return [(names[index], output) for index, output in found]


def test_documents_ask_together_in_rounds(task: Halving) -> None:
    found = ask(task, "8", "1", "4 2 5")
    assert task.rounds == [[8, 1, 4, 2, 5], [2, 1, 2, 4], [2]]
    assert dict(found) == {
        "8": Output({"asked": 3, "numbers": [1]}),
        "1": Output({"asked": 1, "numbers": [1]}),
        "4 2 5": Output({"asked": 2, "numbers": [1, 1, 1]}),
    }


def test_a_document_is_done_when_its_last_answer_is_there(task: Halving) -> None:
    assert [name for name, _ in ask(task, "8", "1", "2 1", "2")] == ["2", "2 1", "1", "8"]


def test_an_error_of_any_window_is_the_documents(task: Halving) -> None:
    found = dict(ask(task, "2 13 2", "26", "4"))
    assert str(found["2 13 2"].error) == str(found["26"].error) == "thirteen"
    assert found["2 13 2"].columns == {}
    assert found["4"] == Output({"asked": 2, "numbers": [1]})
    assert sorted(task.ended) == ["2 13 2", "26", "4"], "one was left hanging"


def test_nothing_to_ask(task: Halving) -> None:
    assert ask(task) == []
    assert task.rounds == []


def test_progress_is_told_in_every_round(task: Halving) -> None:
    told: list[None] = []
    worker: Any = Worker(task, "cpu", torch.get_num_threads(), 0.25)  # type: ignore[arg-type]
    assert len(list(worker([Document("8", [])], lambda: told.append(None)))) == 1
    assert len(told) == len(task.rounds) == 3
