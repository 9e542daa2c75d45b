"""The whole server, as its command starts it: kills cost nothing, and it ends cleanly."""

import subprocess
import threading
from pathlib import Path

import httpx

from tests.pipelines.every_task import CASES, good_rows, make_task
from tests.pipelines.serve.cluster import Command, Load, failures, served, wait_until
from tests.pipelines.serve.raw import attacks, complaint, send
from tests.pipelines.tasks.heads import answers

DECODING = {"num_beams": 2, "max_new_tokens": 24, "min_length": 24}


def assert_logged(command: Command) -> None:
    """A request's id is in the answer and in the log of every process; its text is in none."""
    header = {"x-request-id": "find-me-1"}
    for body in ({"inputs": "marker words"}, {"inputs": "marker", "wrong": "marker"}):
        answered = httpx.post(command.url, json=body, headers=header, timeout=60)
        assert answered.headers.get_list("x-request-id") == ["find-me-1"]
    logs = command.logs()

    def found(text: bytes) -> set[str]:
        files = [file for file in logs.rglob("*") if file.is_file()]
        return {file.name for file in files if text in file.read_bytes()}

    wait_until(lambda: len(found(b"find-me-1")) >= 3, "a process did not log the request", 20)
    for kind in ("proxy", "Gateway", "Model"):
        assert any(kind in name for name in found(b"find-me-1")), found(b"find-me-1")
    assert found(b"marker") == set()


def test_a_server_that_loses_replicas(led_directory: Path, tmp_path: Path) -> None:
    texts = [row["text"] for row in good_rows(12)]
    task = make_task(CASES["summarize"], led_directory, **DECODING)
    expected = [row["summary"] for row in answers(task, text=texts)]
    assert len(set(expected)) > 6
    options = [f"--task-option={name}={value}" for name, value in DECODING.items()]
    bodies = [{"inputs": text} for text in texts]
    with served(tmp_path, led_directory, "--min-replicas=2", *options) as command:
        # The line that it prints works as it is.
        (line,) = (each for each in command.said.splitlines() if each.startswith("curl "))
        told = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
        assert "summary_text" in told.stdout
        assert_logged(command)
        # Nor does what no client sends: every answer is one, and every process stays.
        found = [complaint(attack, send(command.port, attack)) for attack in attacks()]
        assert [each for each in found if each] == []
        assert [len(command.parts(kind)) for kind in ("Model", "Gateway", "ProxyActor")] == [
            2,
            2,
            1,
        ]
        with Load(command.url, bodies, num_clients=6) as load:
            load.wait_for(12)
            for kind in ("Model", "Gateway"):
                killed, *_ = command.parts(kind)
                killed.kill()
                load.wait_for(24)
        assert len(load.outcomes) >= 60
        assert failures(load.outcomes, expected) == []
        broken = [each for each in load.outcomes if not each.is_whole]
        assert len(broken) <= 3, broken  # streams of the gateway that died
        wait_until(lambda: len(command.parts("Model")) == 2, "the replica is not replaced")
        # What was begun is answered.
        last: list[httpx.Response] = []
        long = {"generate_parameters": {"max_new_tokens": 120, "min_length": 120, "num_beams": 1}}
        body = {"inputs": texts[0], "parameters": long}
        asking = threading.Thread(
            target=lambda: last.append(httpx.post(command.url, json=body, timeout=60))
        )
        asking.start()
        threading.Event().wait(0.3)
        assert command.end() == 0
        asking.join()
        assert last[0].status_code == 200
        assert "Traceback" not in command.said, command.said
