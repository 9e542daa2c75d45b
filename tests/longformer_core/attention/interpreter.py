"""Kernels' tests in a process of their own, where Triton's interpreter runs the kernels."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def interpret(file: str, chosen: str) -> None:
    """Run the tests of a file that are so marked with Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", chosen, file]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
