"""A worker's process: its heap, who computes in it, and what is done only every so often.

By default glibc asks the system for each large tensor and returns it when it is freed, as it does
with the ends of its heaps, of which every thread has its own. The system clears every page that it
hands out, and a virtual machine may have to ask for it first: up to a fifth of a job's time. So a
worker on a CPU has one heap for all and keeps it while it computes. Now and then, before a block,
every worker gives back what is free.
"""

import contextlib
import ctypes
import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

# The environment of such a process. glibc reads it as the process starts: later on threads have
# heaps of their own already. Other C libraries ignore it.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
}


def give_memory_back() -> None:
    """Return what is free to the system, where the C library can (glibc).

    Tensors of ever other sizes leave holes in the heap, and a worker that never did this would hold
    what its largest block needed, and more, until it ends.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


class ReadWriteLock:
    """Many readers at once, or a single writer. A writer that waits is next: no reader overtakes.

    In a worker's process blocks that run beside others read; a block that must be alone writes.
    """

    def __init__(self) -> None:
        self._door = threading.Lock()
        self._num_readers = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Hold the lock beside other readers."""
        with self._door:
            self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """Hold the lock alone. Not for a thread that holds it already."""
        with self._door:
            with self._changed:
                self._changed.wait_for(lambda: self._num_readers == 0)
            yield

    def _count(self, change: int) -> None:
        with self._changed:
            self._num_readers += change
            self._changed.notify_all()


class Throttle:
    """Let something happen once in so many seconds, first after the first of them.

    Any thread may ask; each turn is one thread's.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()
        self._lock = threading.Lock()

    def is_due(self) -> bool:
        """Return whether the turn has come; if so it is the caller's, and the next wait begins."""
        with self._lock:
            now = time.monotonic()
            if now - self._last < self._seconds:
                return False
            self._last = now
            return True
