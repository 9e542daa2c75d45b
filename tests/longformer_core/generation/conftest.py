"""One thread: these models are so small that a second thread only waits for the first."""

from collections.abc import Iterator

import pytest

from tests.helpers import num_threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread for the length of a test."""
    with num_threads(1):
        yield
