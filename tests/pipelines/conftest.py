"""One Ray for the whole test session, in this process, joined by nobody else."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster import connect


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """An embedded cluster; jobs run in this process use it because Ray is initialised."""
    # A RAY_ADDRESS of the developer's shell must not send the tests' rows to his cluster.
    os.environ.pop("RAY_ADDRESS", None)
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    with connect(None):
        yield
