"""What encoding holds beside the weights, and how much memory there is.

Shape letters: T packed tokens, d hidden size, f feed-forward size.
"""

import os
from pathlib import Path

import torch

_NO_LIMIT = 2**63
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def encoding_numbers(d: int, f: int, num_tokens: int, most_rows: int) -> int:
    """Return the most numbers alive inside one encoder layer, of T packed tokens.

    Units: `most_rows` of them go through the feed-forward at once (see `chunks.in_chunks`).
    """
    # Beside five of T x d: query and key in the attention, or what the feed-forward makes inside.
    return 5 * num_tokens * d + max(2 * num_tokens * d, min(num_tokens, most_rows) * (2 * d + f))


def available_bytes(device: torch.device) -> int:
    """Return how much memory a new tensor on the device could take (Linux, CUDA).

    On a CPU what the system, or the control group that this process is in, has left. What torch
    keeps of the device for itself counts as free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_system_bytes(), _group_bytes())


def _system_bytes() -> int:
    """Return what is available; where the system does not say, all the memory there is."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return _field(meminfo, "MemAvailable:") * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_bytes() -> int:
    """Return what this process's control group, and those around it, leave (version 2)."""
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return _NO_LIMIT
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "")
    # Inside a container the path may be the host's; then the container's own is the top one.
    folder = _GROUPS.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
    above = [parent for parent in folder.parents if parent.is_relative_to(_GROUPS)]
    return min(map(_left_in, [folder, *above]))


def _left_in(folder: Path) -> int:
    """Return what one group leaves, and more than any machine has where it sets no limit."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        # Pages of files, which the system takes back when it needs them.
        used -= _field(folder / "memory.stat", "inactive_file")
    except OSError:
        return _NO_LIMIT
    return _NO_LIMIT if limit == "max" else max(0, int(limit) - used)


def _field(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise LookupError(f"{file} has no line {name}")
