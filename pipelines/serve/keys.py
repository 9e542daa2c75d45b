"""API keys: only their hashes are stored, and a changed file counts within seconds.

A line of the file is `sha256-in-hex name`; `#` begins a comment.
"""

import hashlib
import hmac
import logging
import os
import re
import time
from pathlib import Path

from pipelines.errors import Refused

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 2.0
_DIGEST = re.compile(r"[0-9a-f]{64}")


def hash_key(key: str) -> str:
    """Return what stands in the file for a key. Keys are random, so one round is enough."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyFile:
    """The keys of a file. A file that breaks while it is in use leaves the last good keys.

    >>> Path("keys").write_text(f"{hash_key('secret')} reporting")
    >>> KeyFile("keys").name_of("secret")
    'reporting'
    """

    def __init__(self, path: str) -> None:
        """Read the file. Raises: Refused where it cannot be read, or holds no key."""
        self._path = Path(path)
        self._keys = self._read()
        self._stamp = self._state()
        self._looked = time.monotonic()

    def name_of(self, key: str) -> str | None:
        """Return a key's name, as every one takes the same time to be compared with."""
        self._look()
        given, found = hash_key(key), None
        for digest, name in self._keys:
            if hmac.compare_digest(digest, given):
                found = name
        return found

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        try:
            stamp = self._state()
            if stamp != self._stamp:
                self._keys, self._stamp = self._read(), stamp
                logger.info("%d keys were read anew", len(self._keys))
        except (OSError, Refused) as error:
            logger.error("the keys were not read anew: %s", error)

    def _state(self) -> tuple[int, int, int]:
        status = os.stat(self._path)
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> list[tuple[str, str]]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"--keys-file {self._path}: cannot be read: {error}") from error
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            digest, _, name = line.partition("#")[0].strip().partition(" ")
            if not digest:
                continue
            if not _DIGEST.fullmatch(digest):
                raise Refused(
                    f"--keys-file {self._path}: line {number} begins with no sha256; write "
                    "the line of `longhaul serve --new-key` there"
                )
            found.append((digest, name.strip() or digest[:8]))
        if not found:
            raise Refused(f"--keys-file {self._path}: holds no key")
        return found
