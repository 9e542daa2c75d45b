"""How much memory there is."""

import os
from pathlib import Path

import pytest
import torch

from longformer_core.scheduling import memory
from longformer_core.scheduling.memory import available_bytes

GB = 10**9


def test_some_memory_is_available_and_not_more_than_there_is() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_bytes(torch.device("cpu")) < total


@pytest.mark.parametrize(
    ("limits", "path", "expected"),
    [
        ({"": "max", "job/step": 5 * GB}, "/job/step", 4 * GB),
        ({"job": 3 * GB, "job/step": "max"}, "/job/step", 2 * GB),
        ({"": 6 * GB, "job": 5 * GB}, "/", 5 * GB),
        # A container that sees the host's name of its group.
        ({"": 7 * GB}, "/../docker/1f", 6 * GB),
        ({"job": 1}, "/job", 0),
        ({"": "max"}, "/", None),
        ({}, "/job", None),
    ],
)
def test_the_tightest_control_group_counts(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    limits: dict[str, int | str],
    path: str,
    expected: int | None,
) -> None:
    for name, limit in limits.items():
        folder = tmp_path / "groups" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{GB + 500}\n")
        (folder / "memory.stat").write_text("anon 7\ninactive_file 500\n")
    (tmp_path / "own").write_text(f"1:name=systemd:/\n0::{path}\n")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(memory, "_system_bytes", lambda: 9 * GB)

    assert available_bytes(torch.device("cpu")) == (9 * GB if expected is None else expected)
