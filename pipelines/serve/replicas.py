"""The backend of a gateway: the model's replicas, of which any may die while it computes.

A document's text is its own alone, so another replica gives the same: a document is asked again,
and a stream goes on behind what was told already.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from longformer_core.scheduling.handle import Tokens
from pipelines.serve.backend import Event, Overloaded, Reply, WorkerDied
from pipelines.tasks.base import Document, Task

logger = logging.getLogger(__name__)

# Tries of one document in all: one, and two more.
_MAX_TRIES = 3
_CHECK_S = 5.0
_LOSSES = (RayActorError, DeploymentUnavailableError)


class Replicas:
    """See the module. `on_retry` is told of each document that is asked again."""

    def __init__(self, handle: Any, on_retry: Callable[[], None] = lambda: None) -> None:
        self._handle, self._streaming = handle, handle.options(stream=True)
        self._on_retry = on_retry

    async def answer(self, task: Task, document: Document, deadline_s: float) -> Reply:
        """See `Backend.answer`."""
        until = time.monotonic() + deadline_s
        for number in range(1, _MAX_TRIES + 1):
            response = self._handle.answer.remote(task, document, until - time.monotonic())
            try:
                reply: Reply = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError as error:
                return Overloaded(0, error.retry_after_s or 1.0)
            except _LOSSES as error:
                self._note(error, number)
            else:
                return reply
        return WorkerDied(_MAX_TRIES)

    async def stream(
        self, task: Task, document: Document, deadline_s: float
    ) -> AsyncGenerator[Event]:
        """See `Backend.stream`. Tokens that were told are compared and not told again."""
        until = time.monotonic() + deadline_s
        told: list[int] = []
        for number in range(1, _MAX_TRIES + 1):
            found: list[int] = []
            events = self._events(task, document, until - time.monotonic())
            try:
                async with aclosing(events):
                    async for event in events:
                        if not isinstance(event, Tokens):
                            yield event
                            continue
                        found += event.ids
                        common = min(len(found), len(told))
                        if found[:common] != told[:common]:
                            # In 16 bits another batch may round otherwise.
                            yield WorkerDied(number)
                            return
                        if len(found) > len(told):
                            new = found[len(told) :]
                            told = [*found]
                            yield Tokens(new)
                return
            except BackPressureError as error:
                yield Overloaded(0, error.retry_after_s or 1.0)
                return
            except _LOSSES as error:
                self._note(error, number)
        yield WorkerDied(_MAX_TRIES)

    async def check(self) -> None:
        """See `Backend.check`: one replica answers soon."""
        try:
            async with asyncio.timeout(_CHECK_S):
                await self._handle.check.remote()
        except TimeoutError:
            raise RuntimeError(f"no model replica answered in {_CHECK_S:g} s") from None
        except Exception as error:
            raise RuntimeError(f"the model does not work: {type(error).__name__}") from error

    async def _events(self, task: Task, document: Document, left_s: float) -> AsyncGenerator[Event]:
        response = self._streaming.stream.remote(task, document, left_s)
        is_done = False
        try:
            async for event in response:
                yield event
            is_done = True
        finally:
            if not is_done:
                response.cancel()

    def _note(self, error: Exception, number: int) -> None:
        logger.warning("a model replica was lost (%s), try %d", type(error).__name__, number)
        if number < _MAX_TRIES:
            self._on_retry()
