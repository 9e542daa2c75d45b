"""The threads that PyTorch's parallel operations leave behind."""

import ctypes
import functools
from collections.abc import Callable

# From OpenMP 5.0: what the runtime keeps for later may go, what the program has set stays.
_PAUSE_SOFT = 1


def end_idle_threads() -> None:
    """End the threads that wait for this thread's next parallel operation, which makes new ones.

    Every thread that ran a parallel operation keeps a team of others waiting. When all teams
    together have more threads than there are cores, GNU's OpenMP no longer waits actively in any
    of them: each operation of each team then waits for the system to wake its threads, which made
    a decoder step 1.7 times slower. So a thread that lets another one compute ends its own first.
    Where the runtime is another or too old, nothing happens.
    """
    pause = _pause_resources()
    if pause is not None:
        pause(_PAUSE_SOFT)


@functools.cache
def _pause_resources() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError, TypeError):
        return None
    return found
