"""The model's replica in Serve: one engine in a process that may die at any moment."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator

from pipelines.serve.backend import Event, Reply
from pipelines.serve.host import EngineHost
from pipelines.serve.metrics import Metrics
from pipelines.serve.options import ServeOptions
from pipelines.serve.scaling import STATISTIC
from pipelines.tasks.base import Document, Task

logger = logging.getLogger(__name__)

_SHOW_EVERY_S = 1.0


class Model:
    """An `EngineHost` as a deployment. It is ready when it has computed its largest document."""

    async def __init__(self, task: Task, options: ServeOptions) -> None:  # type: ignore[misc]
        self._options = options
        self._metrics = Metrics(options.public_name)
        self._host = EngineHost(
            task,
            device=options.device,
            max_queued_tokens=options.queued_tokens(task.max_source_tokens),
            num_threads=options.threads or 1,
            # On CPUs all replicas may be on one machine, beside the gateways.
            memory_share=0.8 if options.device == "cuda" else 0.6 / options.most_replicas,
            # What is broken is the process; the gateways ask another one.
            on_sticky_error=lambda: os._exit(1),
            metrics=self._metrics,
        )
        await self._host.warm_up()
        self._shower = asyncio.create_task(self._show())

    async def answer(self, task: Task, document: Document, deadline_s: float) -> Reply:
        """See `Backend.answer`."""
        return await self._host.answer(task, document, deadline_s)

    async def stream(
        self, task: Task, document: Document, deadline_s: float
    ) -> AsyncGenerator[Event]:
        """See `Backend.stream`."""
        async for event in self._host.stream(task, document, deadline_s):
            yield event

    async def check(self) -> None:
        """See `Backend.check`."""
        await self._host.check()

    async def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica that raises."""
        await self._host.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Serve's policy how much there is to do; see `scaling`."""
        host = self._host
        wait_s = host.speed.seconds_for(host.queued_tokens)
        return {STATISTIC: wait_s / self._options.target_wait_s if host.queued_tokens else 0.0}

    async def _show(self) -> None:
        while True:
            host, load = self._host, self._host.engine.load()
            self._metrics.show(
                {
                    "queued_tokens": host.queued_tokens,
                    "waiting_documents": load.waiting_documents,
                    "running_documents": load.running_documents,
                    "batch_tokens": load.running_tokens,
                    "tokens_per_s": host.speed.tokens_per_s or 0.0,
                }
            )
            await asyncio.sleep(_SHOW_EVERY_S)
