"""The owner file of a run directory."""

import time
from pathlib import Path
from typing import Any

from pipelines.run_directory.ownership import Owner
from pipelines.storage import Location


def owner_file(place: Location) -> Path:
    return Path(place.path, "_owner.json")


def other_owner(place: Location, **changes: Any) -> Owner:
    """Write an owner that is not this process."""
    values = {
        "owner_id": "other",
        "host": "elsewhere/1",
        "pid": 1,
        "process_birth": "1",
        "heartbeat": time.time(),
    }
    owner = Owner(**values | changes)
    place.join("_owner.json").write_json(owner.model_dump())
    return owner
