"""How often something is done that would cost too much every time."""

import threading
import time


class Every:
    """A turn that comes so many seconds after the last one, first after the beginning.

    Any thread may ask; one turn is one thread's.
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
