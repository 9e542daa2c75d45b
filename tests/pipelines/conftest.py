"""A place for a run that gets killed."""

from pathlib import Path

import pytest


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path, Path]:
    journal = tmp_path / "journal"
    journal.mkdir()
    return tmp_path / "run", journal, tmp_path / "log.txt"
