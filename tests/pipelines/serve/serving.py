"""A server of one task in this process: the API and the engine, without Ray."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from pipelines.serve.app import make_app
from pipelines.serve.host import EngineHost
from pipelines.serve.options import ServeOptions
from pipelines.serve.service import Service
from pipelines.tasks.base import Task
from tests.pipelines.every_task import CASES, make_task


class Server:
    """A running server. `host` is its engine, to look at."""

    def __init__(self, task: Task, host: EngineHost, url: str) -> None:
        self.task, self.host, self.url = task, host, url

    @property
    def name(self) -> str:
        return Path(self.task.options.model).name

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **options)


@contextlib.contextmanager
def serving(
    task: Task, keys: Any = None, max_queued_tokens: int = 10**6, **options: Any
) -> Iterator[Server]:
    """Serve a task on a free port of 127.0.0.1 for this block."""
    host = EngineHost(task, device="cpu", max_queued_tokens=max_queued_tokens)
    app = make_app(Service(task, host, ServeOptions(model=task.options.model, **options)), keys)
    with on_loopback(app) as url:
        yield Server(task, host, url)


@contextlib.contextmanager
def on_loopback(app: Any) -> Iterator[str]:
    """Run an ASGI application under uvicorn, in a thread; yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def task_of(name: str, model: Path, **options: Any) -> Task:
    """Return a task of tests that refuses what is too long."""
    given = {"on_long": "error"} | options
    return make_task(CASES[name], model, **given)
