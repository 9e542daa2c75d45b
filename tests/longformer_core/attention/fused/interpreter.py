"""Kernels' tests in a process of their own, where Triton's interpreter runs the kernels."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]


def interpret(file: str, chosen: str, names: str = "") -> None:
    """Run the tests of a file that are so marked, and so named, with Triton's interpreter."""
    # It computes in NumPy, a tile at a time: a second thread of torch would only be in the way.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-p", "no:cacheprovider", "-m", chosen, "-k", names]
    command = [sys.executable, "-m", "pytest", *options, file]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
