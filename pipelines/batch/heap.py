"""What a worker's process does with memory that its tensors no longer need.

By default glibc asks the system for each large tensor and returns it when it is freed, as it does
with the ends of its heaps, of which every thread has its own. The system clears every page that it
hands out, and a virtual machine may have to ask for it first: up to a fifth of a job's time. So a
worker on a CPU has one heap for all and keeps it while it computes. Now and then, before a block,
every worker gives back what is free.
"""

import ctypes
import functools
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
