"""Fixtures shared by all tests: no network, two threads, one tiny LED directory."""

import os
from pathlib import Path

import pytest
import torch

from tests.helpers import make_led_directory

# Read when huggingface_hub is imported, which no test file has done yet.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def led_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny seeded LED model in the published layout; read it, do not write into it."""
    return make_led_directory(tmp_path_factory.mktemp("led") / "model")
