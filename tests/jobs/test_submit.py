"""`ray job submit` with the README's commands, against a head on loopback that wants a token."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipelines.driving import (
    ROOT,
    kill_after,
    num_committed,
    rows_of,
    summaries,
    wait_for,
)
from tests.pipelines.every_task import CASES, assert_same, good_rows, make_task, write_rows
from tests.pipelines.tasks.heads import answers


@dataclass(frozen=True)
class Head:
    """A running head and what a shell needs to talk to it."""

    environment: dict[str, str]
    submit: str  # the README's command
    dashboard: str


def readme_commands() -> str:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- test: submit -->\n```sh\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    return block[1].replace("\\\n", " ")


def command(text: str, starts_with: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(starts_with))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """The README's block, step by step; only places and ports are this test's own."""
    folder = tmp_path_factory.mktemp("head")
    text = readme_commands().replace("~/longhaul.token", str(folder / "token"))
    subprocess.run(["bash", "-c", command(text, "(umask")], check=True)
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    exported = command(text, "export").removeprefix("export ").split()
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    # `ray` and `python` are this environment's, here and in the jobs.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment |= dict(pair.split("=", 1) for pair in exported)
    ports = {"6379": str(free_port()), "8265": str(free_port())}
    start = command(text, "ray start --head").replace("0.0.0.0", "127.0.0.1")
    for old, new in ports.items():
        start = start.replace(old, new)
    start += f" --dashboard-agent-listen-port {free_port()} --metrics-export-port {free_port()}"
    start += " --node-ip-address 127.0.0.1 --num-cpus 3 --disable-usage-stats --block"
    log = folder / "head.txt"
    dashboard = f"http://127.0.0.1:{ports['8265']}"

    def is_up() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:  # `ray` itself takes seconds to say no
            if probe.connect_ex(("127.0.0.1", int(ports["8265"]))):
                return False
        listed = ["ray", "job", "list", "--address", dashboard]
        return subprocess.run(listed, env=environment, capture_output=True).returncode == 0

    # A path of its own: sockets below it may have no more than 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as place:
        start += f" --temp-dir {place}"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                shlex.split(start), env=environment, stdout=file, stderr=file
            )
        try:
            wait_for(is_up, "the head")
            submit = command(text, "ray job submit").replace("http://head:8265", dashboard)
            yield Head(environment, submit, dashboard)
        finally:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End the head and what it started, by id."""
    started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in started:
        with contextlib.suppress(psutil.NoSuchProcess):  # ends with another
            one.terminate()
    kill_after(3.0, started)
    process.wait()


def submit(
    head: Head, options: str, arguments: dict[str, str], *, task: str = "summarize"
) -> "subprocess.CompletedProcess[str]":
    """The README's submission, to other places; `options` go to `ray job submit` itself."""
    line, _, job = head.submit.replace("jobs.summarize", f"jobs.{task}").partition(" -- ")
    words = [w for w in shlex.split(job) if not w.startswith("s3://")]
    places = {"--input", "--output", "--model", "--num-beams", "4", "--max-new-tokens", "256"}
    given = [w for name, value in arguments.items() for w in (name, value)]
    whole = [*shlex.split(line), *shlex.split(options), "--"]
    whole += [*(w for w in words if w not in places), *given]
    return subprocess.run(
        whole, env=head.environment, cwd=ROOT, capture_output=True, text=True, timeout=240.0
    )


def job_info(head: Head, submission: str) -> dict[str, Any]:
    """What the dashboard knows of a job, asked by a process of the submitter's environment."""
    code = (
        "import json, sys; from ray.job_submission import JobSubmissionClient as C;"
        "i = C(sys.argv[1]).get_job_info(sys.argv[2]);"
        "print(json.dumps({'status': i.status, 'exit': i.driver_exit_code}))"
    )
    done = subprocess.run(
        ["python", "-c", code, head.dashboard, submission],
        env=head.environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_without_the_token_nothing_runs(head: Head) -> None:
    bare = {k: v for k, v in head.environment.items() if not k.startswith("RAY_AUTH")}
    bare["HOME"] = os.devnull
    listed = ["ray", "job", "list", "--address", head.dashboard]
    refused = subprocess.run(listed, env=bare, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "authentication" in refused.stderr


@pytest.mark.slow
def test_a_stopped_job_resumes(
    head: Head, corpus: Path, led_directory: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    output = tmp_path / "run"
    arguments = {
        "--input": str(corpus),
        "--output": str(output),
        "--model": str(led_directory),
        "--max-new-tokens": "16",
        "--no-repeat-ngram-size": "3",
        "--max-source-tokens": "512",
        "--rows-per-block": "2",
    }
    started = submit(head, "--submission-id first --no-wait", arguments)
    assert started.returncode == 0, started.stdout + started.stderr
    wait_for(lambda: num_committed(output) >= 3, "the third block")
    stop = ["ray", "job", "stop", "--address", head.dashboard, "first"]
    subprocess.run(stop, env=head.environment, check=True, capture_output=True)
    status = json.loads((output / "status.json").read_text())
    assert status["status"] == "cancelled"
    assert job_info(head, "first")["status"] == "STOPPED"
    assert not (output / "_SUCCESS").exists()
    # Blocks may have another size on a resume; few large ones take less time.
    resumed = submit(head, "--submission-id second", arguments | {"--rows-per-block": "24"})
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "done before" in resumed.stdout
    assert summaries(output) == undisturbed
    assert json.loads((output / "status.json").read_text())["attempt"] == 2


def test_a_spent_budget_is_exit_code_3(head: Head, led_directory: Path, tmp_path: Path) -> None:
    table = pa.table({"id": ["a", "b", "c"], "text": ["one document", " ", "another"]})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "rows.parquet")
    arguments = {
        "--input": str(tmp_path / "in"),
        "--output": str(tmp_path / "run"),
        "--model": str(led_directory),
        "--max-new-tokens": "4",
    }
    spent = submit(head, "--submission-id spent", arguments)
    assert spent.returncode == 1, spent.stdout + spent.stderr
    assert job_info(head, "spent") == {"status": "FAILED", "exit": 3}
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_another_task(head: Head, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    case, rows = CASES["choose"], good_rows(9)
    corpus = write_rows(tmp_path / "in" / "rows.parquet", rows)
    arguments = {
        "--input": str(corpus),
        "--output": str(tmp_path / "run"),
        "--model": str(model_of("choose")),
        "--question-column": "query",
        "--device": "cpu",
    }
    done = submit(head, "--submission-id choose", arguments, task="choose")
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows_of(tmp_path / "run")
    columns = {role: [row[column] for row in rows] for role, column in case.columns.items()}
    expected = answers(make_task(case, model_of("choose")), **columns)
    for row, answer in zip(rows, expected, strict=True):
        assert_same({name: found[row["id"]][name] for name in answer}, answer)
