"""Run directories: one that is only looked at, one whose driver gets killed."""

from pathlib import Path

import pytest

from pipelines.run_directory import ownership
from pipelines.storage import Location, locate
from tests.pipelines.driving import Trial


@pytest.fixture
def trial(ray_session: None, tmp_path: Path, corpus: Path, led_directory: Path) -> Trial:
    return Trial(tmp_path, corpus=str(corpus), model=str(led_directory))


@pytest.fixture
def place(tmp_path: Path) -> Location:
    return locate(str(tmp_path / "run"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else writes into this directory: no need to wait for a rival."""
    monkeypatch.setattr(ownership, "_SETTLE_S", 0.0)
