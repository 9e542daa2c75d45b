"""What a worker's process does with memory that its tensors no longer need.

glibc returns the end of a heap to the system whenever much of it is free, and takes it again for
the next layer. The system clears every page that it hands out: in bfloat16 that took a sixth of a
job's time. So a worker keeps what it has while it computes, and gives it back between blocks.
"""

import ctypes
import functools
from typing import Any

# glibc's numbers for `mallopt`. A thread's heap is 64 MiB at most: kept in reserve at its end, that
# much keeps it whole, and larger requests than half of it are the system's in any case.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_HEAP_BYTES = 64 * 2**20
_NEVER = 2**31 - 1


def keep_memory() -> None:
    """Let this process keep what is freed, where the C library can (glibc).

    For tensors of 16 bits. An encoder's in float32 take almost half of a thread's heap each: so
    much is lost between them that it takes 4.8 GB instead of 3.3, and no less time.
    """
    if (mallopt := _function("mallopt")) is not None:
        mallopt(_MMAP_THRESHOLD, _HEAP_BYTES // 2)
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_TOP_PAD, _HEAP_BYTES)


def give_memory_back() -> None:
    """Return what is free to the system, where the C library can (glibc).

    Tensors of ever other sizes leave holes in the heap: without this a worker grows for as long as
    it runs, for nothing.
    """
    if (trim := _function("malloc_trim")) is not None:
        trim(0)


@functools.cache
def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None)
