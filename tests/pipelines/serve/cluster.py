"""`longhaul serve` in a process of its own, its parts to be killed, and clients that load it."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

_START_S = 120.0


class Command:
    """A running `longhaul serve`."""

    def __init__(self, log: Path, *words: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.serve", *words, "--port", str(self.port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """What it printed by now."""
        return self._log.read_text()

    def wait_until_ready(self) -> None:
        until = time.monotonic() + _START_S
        while "curl " not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.1)

    def parts(self, kind: str) -> list[psutil.Process]:
        """The processes of a kind: Model, Gateway (replicas), ServeController, ProxyActor."""
        found = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                name = each.cmdline()[0] if each.cmdline() else ""
                if f"longhaul:{kind}" in name or f"ray::{kind}" in name:
                    found.append(each)
        return found

    def logs(self) -> Path:
        """Where the processes of its cluster log."""
        for each in psutil.Process(self.process.pid).children(recursive=True):
            for word in each.cmdline():
                if word.startswith(("--logs-dir=", "--log-dir=", "--log_dir=")):
                    return Path(word.partition("=")[2])
        raise AssertionError("the cluster has no logs")

    def end(self, how: signal.Signals = signal.SIGINT, timeout_s: float = 90) -> int:
        """Let it end; return its exit code. Whatever is left of it is killed."""
        left = psutil.Process(self.process.pid).children(recursive=True)
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(timeout_s)
        finally:
            for each in left:
                with contextlib.suppress(psutil.Error):
                    each.kill()
            self.process.kill()


@contextlib.contextmanager
def served(tmp_path: Path, model: Path, *words: str) -> Iterator[Command]:
    """Serve a model for this block."""
    command = Command(tmp_path / "serve.txt", "--model", str(model), "--device", "cpu", *words)
    try:
        command.wait_until_ready()
        yield command
    finally:
        if command.process.poll() is None:
            command.end()


@dataclass
class Outcome:
    """What one request came to."""

    place: int
    is_streamed: bool
    began: float
    seconds: float = 0.0
    status: int | None = None
    text: str = ""
    error: Any = None
    is_whole: bool = False


@dataclass
class Load:
    """Clients that ask for texts, plain and streamed in turn, until they are stopped."""

    url: str
    bodies: list[dict[str, Any]]
    num_clients: int
    share_streamed: float = 0.5
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._is_stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(number,)) for number in range(self.num_clients)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopping.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, count: int, timeout_s: float = 60) -> None:
        """Wait for so many more outcomes."""
        goal, until = len(self.outcomes) + count, time.monotonic() + timeout_s
        while len(self.outcomes) < goal:
            assert time.monotonic() < until, f"{len(self.outcomes)} of {goal} requests"
            time.sleep(0.02)

    def _ask(self, number: int) -> None:
        turn = number
        with httpx.Client(timeout=60) as client:
            while not self._is_stopping.is_set():
                is_streamed = (turn % 10) < 10 * self.share_streamed
                outcome = Outcome(turn % len(self.bodies), is_streamed, time.monotonic())
                try:
                    (self._stream if is_streamed else self._plain)(client, outcome)
                except httpx.HTTPError as error:
                    outcome.error = repr(error)
                outcome.seconds = time.monotonic() - outcome.began
                self.outcomes.append(outcome)
                turn += self.num_clients + 1

    def _plain(self, client: httpx.Client, outcome: Outcome) -> None:
        response = client.post(self.url, json=self.bodies[outcome.place])
        outcome.status = response.status_code
        if response.status_code == 200:
            outcome.text, outcome.is_whole = response.json()[0]["summary_text"], True
        else:
            outcome.error = response.json()["error"]

    def _stream(self, client: httpx.Client, outcome: Outcome) -> None:
        body = self.bodies[outcome.place] | {"stream": True}
        with client.stream("POST", self.url, json=body) as response:
            outcome.status = response.status_code
            if response.status_code != 200:
                outcome.error = json.loads(response.read())["error"]
                return
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                data = json.loads(line.removeprefix("data: "))
                if "token" in data:
                    outcome.text += data["token"]["text"]
                elif "error" in data:
                    outcome.error = data["error"]
                elif "summary_text" in data:
                    outcome.is_whole = data["summary_text"] == outcome.text


def failures(outcomes: list[Outcome], expected: list[str]) -> list[Outcome]:
    """Requests that were lost: not answered, or answered with other than the job's row.

    A stream may break off, with an error event behind what was right.
    """
    lost = []
    for each in outcomes:
        right = expected[each.place]
        is_right = each.is_whole and each.text == right
        is_told = each.is_streamed and each.error is not None and right.startswith(each.text)
        is_told = is_told and isinstance(each.error, dict)
        if not (is_right or is_told):
            lost.append(each)
    return lost


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < until, what
        time.sleep(0.05)
