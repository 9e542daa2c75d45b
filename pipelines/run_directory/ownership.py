"""The right to write to a run directory: one process at a time, by heartbeat."""

import contextlib
import os
import socket
import time
import uuid
from pathlib import Path

from pydantic import ValidationError

from pipelines.errors import Refused
from pipelines.run_directory.schemas import StrictModel
from pipelines.storage import Location

HEARTBEAT_S = 5.0
STALE_AFTER_S = 60.0
# Between writing one's name and reading it back. A rival that looked before we wrote has written
# by then, and whoever reads another name steps back.
_SETTLE_S = 1.0


class Owner(StrictModel):
    """_owner.json: the process that may write to the run directory."""

    owner_id: str
    host: str
    pid: int
    process_birth: str
    heartbeat: float


def _host() -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}"
    return socket.gethostname()


def _process_birth(pid: int) -> str | None:
    """When a process of this host was started; None if it is gone (a zombie is gone)."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return "alive"
        return "alive"
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class Ownership:
    """The right to write to a run directory: one process at a time, by heartbeat."""

    def __init__(self, run_directory: Location) -> None:
        self._file = run_directory.join("_owner.json")
        self.held = True  # until another process is seen in our place
        pid = os.getpid()
        self._me = Owner(
            owner_id=uuid.uuid4().hex,
            host=_host(),
            pid=pid,
            process_birth=_process_birth(pid) or "",
            heartbeat=time.time(),
        )

    def claim(self) -> None:
        """Become the owner.

        Raises: Refused while another owner lives: its process on this host, or elsewhere a
        heartbeat younger than 60 s.
        """
        holder = self._read()
        if holder is not None and self._lives(holder):
            raise Refused(self._taken(holder))
        self._write()
        time.sleep(_SETTLE_S)
        holder = self._read()
        if holder is None or holder.owner_id != self._me.owner_id:
            raise Refused(self._taken(holder))

    def beat(self) -> bool:
        """Renew the heartbeat; False if another process has taken the directory over."""
        holder = self._read()
        if holder is not None and holder.owner_id != self._me.owner_id:
            self.held = False
            return False
        self._write()
        return True

    def release(self) -> None:
        holder = self._read()
        if holder is not None and holder.owner_id == self._me.owner_id:
            self._file.filesystem.delete_file(self._file.path)

    def _write(self) -> None:
        self._me.heartbeat = time.time()
        self._file.write_json(self._me.model_dump())

    def _read(self) -> Owner | None:
        try:
            return Owner.model_validate_json(self._file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def _lives(self, holder: Owner) -> bool:
        if holder.host == self._me.host:
            return _process_birth(holder.pid) == holder.process_birth
        return time.time() - holder.heartbeat < STALE_AFTER_S

    def _taken(self, holder: Owner | None) -> str:
        who = "another process" if holder is None else f"process {holder.pid} on {holder.host}"
        return (
            f"{self._file}: {who} is working on this run directory; wait for it, end it, "
            "or choose another --output"
        )
