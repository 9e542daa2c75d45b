"""One server a task, for all tests of the API."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipelines.every_task import LIMIT
from tests.pipelines.serve.serving import Server, serving, task_of


@pytest.fixture(scope="session")
def server_of(model_of: Callable[[str], Path]) -> Iterator[Callable[[str], Server]]:
    """Return a function from the name of a task to its running server."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Server] = {}

        def server(name: str) -> Server:
            if name not in found:
                task = task_of(name, model_of(name), max_source_tokens=LIMIT)
                found[name] = stack.enter_context(serving(task))
            return found[name]

        yield server
