"""Models that fail, replicas that die: whose error it is, and what the others see of it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from longformer_core.errors import OutOfMemoryError
from longformer_core.scheduling.handle import Tokens
from pipelines.serve import host as host_module
from pipelines.serve.backend import Event, Overloaded, WorkerDied
from pipelines.serve.replicas import Replicas
from pipelines.tasks.base import Document, Output
from tests.pipelines.every_task import LIMIT, good_rows
from tests.pipelines.serve.serving import Server, serving, task_of

TEXTS = [row["text"] for row in good_rows(3)]


@pytest.fixture
def server(model_of: Callable[[str], Path]) -> Iterator[Server]:
    """A server of embeddings that a test may break."""
    with serving(task_of("embed", model_of("embed"), max_source_tokens=LIMIT)) as server:
        yield server


def fail_with(server: Server, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def encode(*_: Any, **__: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(server.host.engine._model, "encode", encode)


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["type"], error["message"]


def test_weights_that_are_no_numbers(server: Server) -> None:
    with torch.no_grad():
        next(server.host.engine._model.parameters()).fill_(torch.nan)
    status, kind, message = error_of(server.post("/", {"inputs": TEXTS[0]}))
    assert (status, kind) == (424, "inference")
    assert message.startswith("NonFinite")
    assert error_of(httpx.get(f"{server.url}/health/ready"))[:2] == (503, "not_ready")
    assert httpx.get(f"{server.url}/health/live").status_code == 200


def test_a_document_without_memory(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(server, monkeypatch, OutOfMemoryError("needs 9 GB"))
    status, kind, message = error_of(server.post("/", {"inputs": TEXTS[0]}))
    assert (status, kind, message) == (424, "inference", "OutOfMemory: needs 9 GB")


def test_a_broken_device_ends_the_process(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    server.host._on_sticky_error = lambda: ended.append(True)
    fail_with(server, monkeypatch, ValueError("one document's"))
    assert error_of(server.post("/", {"inputs": TEXTS[0]}))[:2] == (424, "inference")
    assert not ended
    illegal = RuntimeError("CUDA error: an illegal memory access was encountered")
    fail_with(server, monkeypatch, illegal)
    assert error_of(server.post("/", {"inputs": TEXTS[0]}))[:2] == (424, "inference")
    assert ended


def test_an_engine_that_stands_still_is_not_ready(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "_WEDGED_S", 0.3)
    encode = server.host.engine._model.encode

    def slowly(*given: Any, **options: Any) -> torch.Tensor:
        time.sleep(1.5)
        return encode(*given, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(server.host.engine._model, "encode", slowly)
    assert error_of(httpx.get(f"{server.url}/health/ready"))[:2] == (503, "not_ready")


# --- replicas that die ---


class Handle:
    """A deployment handle of Serve whose replicas do as told, one after the other."""

    def __init__(self, *replicas: list[Any]) -> None:
        self._replicas = list(replicas)
        self.answer = self.stream = self
        self.num_cancelled = 0

    def options(self, *, stream: bool) -> "Handle":
        return self

    def remote(self, *_: Any) -> "Response":
        return Response(self, self._replicas.pop(0))


class Response:
    def __init__(self, handle: Handle, events: list[Any]) -> None:
        self._handle, self._events = handle, events

    def cancel(self) -> None:
        self._handle.num_cancelled += 1

    async def __aiter__(self) -> AsyncGenerator[Any]:
        for event in self._events:
            if isinstance(event, Exception):
                raise event
            yield event

    def __await__(self) -> Any:
        async def last() -> Any:
            return [event async for event in self][-1]

        return last().__await__()


DEATH = ActorDiedError()
DONE = Output({"summary": "abcd"}, 4)
DOCUMENT: Any = Document("", [])
TASK: Any = None


def told(*replicas: list[Any]) -> list[Event]:
    async def read() -> list[Event]:
        return [event async for event in Replicas(Handle(*replicas)).stream(TASK, DOCUMENT, 9.0)]

    return asyncio.run(read())


def answered(*replicas: list[Any]) -> Any:
    async def ask() -> Any:
        return await Replicas(Handle(*replicas)).answer(TASK, DOCUMENT, 9.0)

    return asyncio.run(ask())


def test_a_document_is_asked_again_twice() -> None:
    assert answered([DONE]) == DONE
    assert answered([DEATH], [DEATH], [DONE]) == DONE
    assert answered([DEATH], [DEATH], [DEATH]) == WorkerDied(3)
    assert answered([BackPressureError(9, 9, 429, 2.0)]) == Overloaded(0, 2.0)


def test_a_stream_goes_on_behind_what_was_told() -> None:
    first = [Tokens([1, 2, 3]), DEATH]
    assert told(first, [Tokens([1]), Tokens([2, 3, 4]), Tokens([5]), DONE]) == [
        Tokens([1, 2, 3]),
        Tokens([4]),
        Tokens([5]),
        DONE,
    ]
    assert told([DEATH], [Tokens([1]), DEATH], [Tokens([1, 2]), DONE]) == [
        Tokens([1]),
        Tokens([2]),
        DONE,
    ]


def test_a_stream_that_would_change_breaks_off() -> None:
    first = [Tokens([1, 2, 3]), DEATH]
    assert told(first, [Tokens([1]), Tokens([9, 3, 4]), DONE]) == [
        Tokens([1, 2, 3]),
        WorkerDied(2),
    ]
    assert told([DEATH], [DEATH], [DEATH]) == [WorkerDied(3)]


def test_who_leaves_cancels_the_replica() -> None:
    handle = Handle([Tokens([1]), Tokens([2]), DONE])

    async def leave() -> None:
        events = Replicas(handle).stream(TASK, DOCUMENT, 9.0)
        assert await anext(events) == Tokens([1])
        await events.aclose()

    asyncio.run(leave())
    assert handle.num_cancelled == 1
