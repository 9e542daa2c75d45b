"""A run inside a program that uses Ray itself: nothing of ours is left behind in its process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.driving import ROOT, summaries

# One process each: what a run might leave behind must not come from another test.
PROGRAM = """
import json, logging, os, signal, sys

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from tests.pipelines.drive import drive

kind, num_runs, folder, arguments = json.loads(sys.argv[1])


def standing():
    loggers = {
        name: (logger.level, logger.propagate, [(id(h), h.level) for h in logger.handlers])
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
    }
    loggers["root"] = (logging.root.level, True, [(id(h), h.level) for h in logging.root.handlers])
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    return {"environment": dict(os.environ), "loggers": loggers, "handlers": handlers}


def own_pipeline(name):
    # Without an id column, and with files of few rows: our checkpoint would drop or refuse rows.
    source, target = f"{folder}/{name}-in", f"{folder}/{name}-out"
    os.makedirs(source)
    pq.write_table(pa.table({"value": range(1000)}), f"{source}/a.parquet")
    ray.data.read_parquet(source).write_parquet(target)
    values = pq.read_table(target)["value"].to_pylist()
    assert sorted(values) == list(range(1000)), len(values)


def check(before):
    after = standing()
    for kind, values in before.items():
        for name, value in values.items():
            assert after[kind].get(name) == value, (kind, name, value, after[kind].get(name))
    added = after["environment"].keys() - before["environment"].keys()
    assert not added, added


def own_cluster():
    return ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)


signal.signal(signal.SIGTERM, lambda *_: None)
logging.basicConfig(level=logging.INFO)
if kind == "the program's cluster":
    own_cluster()
    own_pipeline("first")
elif kind == "the program's cluster before":
    own_cluster()
    own_pipeline("first")
    ray.shutdown()
context = ray.data.DataContext.get_current()
before_context = {n: repr(v) for n, v in vars(context).items()}
before = standing()
for number in range(num_runs):
    drive(output=f"{folder}/run-{number}", **arguments)
    check(before)
    assert ray.data.DataContext.get_current() is context
    assert {n: repr(v) for n, v in vars(context).items()} == before_context
if not ray.is_initialized():
    own_cluster()
own_pipeline("last")
print("done")
"""


@pytest.mark.parametrize(
    ("kind", "num_runs"),
    [
        ("an embedded cluster", 2),
        pytest.param("the program's cluster", 2, marks=pytest.mark.slow),
        pytest.param("the program's cluster before", 1, marks=pytest.mark.slow),
        pytest.param("an embedded cluster", 3, marks=pytest.mark.slow),
    ],
)
def test_a_program_finds_its_process_as_it_was(
    tmp_path: Path,
    corpus: Path,
    led_directory: Path,
    undisturbed: dict[str, str],
    kind: str,
    num_runs: int,
) -> None:
    environment = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
    # Ray keeps the token of a program's own cluster in the home directory.
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    arguments: dict[str, Any] = {"corpus": str(corpus), "model": str(led_directory), "limit": 24}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([kind, num_runs, str(tmp_path), arguments])],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split()[-1] == "done"
    for number in range(num_runs):
        rows = summaries(tmp_path / f"run-{number}")
        assert len(rows) == 24
        assert rows.items() <= undisturbed.items()
