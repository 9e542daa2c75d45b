"""What the blocks that run at once in one worker share: its process, and its time."""

import contextlib
import threading
import time
from collections.abc import Iterator


class Room:
    """A worker's process, for many blocks at once or for a single one.

    Who wants to be alone is next: nobody enters before it has had its turn.
    """

    def __init__(self) -> None:
        self._door = threading.Lock()
        self._num_inside = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Be inside with others."""
        with self._door:
            self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be inside with nobody else. Not to be asked for by who is inside already."""
        with self._door:
            with self._changed:
                self._changed.wait_for(lambda: self._num_inside == 0)
            yield

    def _count(self, change: int) -> None:
        with self._changed:
            self._num_inside += change
            self._changed.notify_all()


class Stopwatch:
    """The seconds in which anything runs; what overlaps is not counted twice.

    Units: every `stop` gives the seconds that no `stop` before it gave. Their sum is the time in
    which at least one thing ran.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_running = 0
        self._told_until = 0.0

    def start(self) -> None:
        with self._lock:
            if not self._num_running:
                self._told_until = time.monotonic()
            self._num_running += 1

    def stop(self) -> float:
        with self._lock:
            now = time.monotonic()
            seconds, self._told_until = now - self._told_until, now
            self._num_running -= 1
        return seconds
