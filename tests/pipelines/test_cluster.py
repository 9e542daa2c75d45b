"""Embedded clusters: one after another in one process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A task each, for it is the worker process that has to show the token.
PROGRAM = """
import ray
from pipelines.cluster import connect

for number in range(2):
    with connect(None):
        print(ray.get(ray.remote(num_cpus=0)(lambda: number).remote()), flush=True)
"""


def test_a_second_cluster_in_one_process(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    environment.pop("RAY_ADDRESS", None)
    # As the tests' own cluster sets them for this process.
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split()[-2:] == ["0", "1"]
