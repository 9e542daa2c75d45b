"""Runs whose drivers get killed, and what they leave to be looked at."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.batch.driver import Report
from pipelines.run_directory.directory import Run
from pipelines.storage import locate
from tests.pipelines.drive import drive

ROOT = Path(__file__).resolve().parents[2]


def rows_of(output: str | Path) -> dict[str, dict[str, Any]]:
    """id -> row of a completed run, read as a user reads it: the files of the manifest."""
    run = locate(str(output))
    assert run.join("_SUCCESS").exists()
    files = run.join("_manifest.json").read_json()["files"]
    tables = [pq.read_table(run.join(f["path"]).path, filesystem=run.filesystem) for f in files]
    rows = pa.concat_tables(tables).to_pylist()
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


def summaries(output: str | Path) -> dict[str, str]:
    """id -> summary of a completed run."""
    return {name: row["summary"] for name, row in rows_of(output).items()}


def begun(journal: Path) -> Counter[str]:
    return Counter(line for log in journal.glob("*.log") for line in log.read_text().splitlines())


def num_committed(output: str | Path) -> int:
    """Blocks that are durable."""
    return len(Run(locate(str(output)), "", 0).committed_files())


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.2)


def kill_after(grace_s: float, processes: Sequence[psutil.Process]) -> None:
    """SIGKILL to those that have not ended within `grace_s`."""
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended since
            process.kill()


class Driver:
    """A driver process and everything it started."""

    def __init__(self, log: Path, module: str, *words: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        environment.pop("RAY_ADDRESS", None)
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
            )
        self.log = log

    def kill(self) -> None:
        """SIGKILL to the driver; what it leaves behind is ended by id."""
        if self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        kill_after(2.0, children)

    def wait(self) -> int:
        return self.process.wait(timeout=240.0)


class Trial:
    """One run directory and the arguments of its attempts. Workers note what they begin."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        self.journal, self.log = folder / "journal", folder / "log.txt"
        self.journal.mkdir()
        task = {"journal": str(self.journal), "slow_s": 0.02}
        self.arguments = {"output": str(folder / "run"), "task": task} | arguments

    @property
    def output(self) -> str:
        return str(self.arguments["output"])

    def start(self, module: str = "tests.pipelines.drive", **changes: Any) -> Driver:
        """An attempt in a process of its own."""
        return Driver(self.log, module, json.dumps(self.arguments | changes))

    def here(self, **changes: Any) -> Report:
        """An attempt in this process, on its Ray."""
        return drive(**self.arguments | changes)

    def said(self) -> str:
        """The end of what the drivers printed."""
        return self.log.read_text()[-3000:]

    def num_committed(self) -> int:
        return num_committed(self.output)

    def num_begun(self) -> int:
        return begun(self.journal).total()
