"""What a server refuses, what it stops, and how it says so."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.errors import Refused
from pipelines.serve import keys as keys_module
from pipelines.serve.errors import STATUS
from pipelines.serve.host import Speed
from pipelines.serve.keys import KeyFile, hash_key
from tests.pipelines.every_task import LIMIT, good_rows
from tests.pipelines.serve.serving import Server, serving, task_of

# Within the limit twice, beyond it three times.
TEXT = good_rows(1, 90)[0]["text"]
# Long enough to be interrupted: greedy decoding that may not end.
ENDLESS = {"generate_parameters": {"num_beams": 1, "max_new_tokens": 120, "min_length": 120}}


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == response.status_code == STATUS[error["type"]]
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float = 20) -> float:
    began = time.monotonic()
    while not is_true():
        assert time.monotonic() - began < timeout_s, what
        time.sleep(0.01)
    return time.monotonic() - began


def is_idle(server: Server) -> bool:
    load = server.host.engine.load()
    return load.running_documents + load.waiting_documents + server.host.queued_documents == 0


@pytest.fixture(scope="module")
def limited(model_of: Callable[[str], Path]) -> Iterator[Server]:
    """Summaries within narrow limits."""
    task = task_of("summarize", model_of("summarize"), max_source_tokens=LIMIT)
    with serving(
        task, max_queued_tokens=300, max_body_bytes=5000, timeout_s=60, body_timeout_s=0.5
    ) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/summarize", "{", "malformed"),
        ("/summarize", '"text"', "invalid"),
        ("/summarize", "{}", "invalid"),
        ("/summarize", {"inputs": 3}, "invalid"),
        ("/summarize", {"inputs": ["a"]}, "invalid"),
        ("/summarize", {"inputs": " \n\u00a0"}, "empty"),
        ("/summarize", '{"inputs": "\\ud800"}', "invalid"),
        ("/summarize", {"inputs": "a", "trunkate": "left"}, "invalid"),
        ("/summarize", {"inputs": "a", "parameters": {"generate_parameters": {"num_beams": 0}}},
         "invalid"),
        ("/summarize", {"inputs": "a", "parameters": {"generate_parameters": {
            "max_new_tokens": 100_000}}}, "invalid"),
        ("/summarize", {"inputs": "a", "parameters": {"num_sentences": 2}}, "invalid"),
        ("/summarize", {"inputs": "long " * 400}, "too_long"),
        ("/summarize", {"inputs": "x" * 6000}, "too_large"),
        ("/nowhere", {"inputs": "a"}, "not_found"),
        ("/feature-extraction", {"inputs": "a"}, "not_found"),
        ("/info", {"inputs": "a"}, "method_not_allowed"),
        ("/v1/completions", {"model": "other", "prompt": "a"}, "model_not_found"),
        ("/v1/chat/completions", {"model": "dummy", "messages": [
            {"role": "system", "content": "a"}]}, "empty"),
    ],
)  # fmt: skip
def test_refusals(limited: Server, path: str, body: Any, kind: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    response = httpx.post(
        limited.url + path, content=content, headers={"content-type": "application/json"}
    )
    error = error_of(response)
    assert error["type"] == kind
    assert "long long" not in error["message"]
    assert is_idle(limited)


def test_a_compressed_body_is_refused(limited: Server) -> None:
    response = httpx.post(limited.url, content=b"x", headers={"content-encoding": "gzip"})
    assert error_of(response)["type"] == "unsupported_encoding"


def test_a_body_without_length_is_counted(limited: Server) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    assert error_of(httpx.post(limited.url, content=chunks()))["type"] == "too_large"


def test_a_slow_body(limited: Server) -> None:
    place = httpx.URL(limited.url)
    with socket.create_connection((place.host, place.port or 80), timeout=10) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("given", "is_kept"), [("abc-1.2_3", True), ("a" * 65, False), ("é", False)]
)
def test_request_ids(limited: Server, given: str, is_kept: bool) -> None:
    response = httpx.get(f"{limited.url}/info", headers={"x-request-id": given.encode("latin-1")})
    assert response.status_code == 200
    found = response.headers["x-request-id"]
    assert (found == given) == is_kept
    assert len(found) <= 64


def test_information(limited: Server) -> None:
    info = httpx.get(f"{limited.url}/info").json()
    assert (info["task"], info["max_source_tokens"]) == ("summarize", LIMIT)
    assert info["max_body_bytes"] == 5000
    for path, status in (("/health/live", "live"), ("/health/ready", "ready")):
        assert httpx.get(limited.url + path).json() == {"status": status}
    routes = httpx.get(f"{limited.url}/openapi.json").json()["paths"]
    assert {"/", "/summarize", "/v1/completions", "/tokenize"} <= {*routes}
    assert httpx.get(f"{limited.url}/docs").status_code == 200


def test_a_deadline(limited: Server) -> None:
    began = time.monotonic()
    body = {"inputs": TEXT, "parameters": ENDLESS, "timeout_s": 0.05}
    assert error_of(limited.post("/summarize", body))["type"] == "deadline"
    assert time.monotonic() - began < 2
    wait_until(lambda: is_idle(limited), "the engine goes on")


def test_overload(limited: Server) -> None:
    """One document fills the queue; others are told at once when to come back, and it is true."""
    answers: list[httpx.Response] = []
    body = {"inputs": TEXT * 2, "parameters": ENDLESS}
    limited.post("/summarize", body)  # so that the speed is known
    first = threading.Thread(target=lambda: answers.append(limited.post("/summarize", body)))
    first.start()
    wait_until(lambda: limited.host.queued_documents == 1, "nothing is queued")
    began = time.monotonic()
    response = limited.post("/summarize", body)
    told_s = time.monotonic() - began
    error = error_of(response)
    assert error["type"] == "overloaded"
    assert int(response.headers["retry-after"]) >= 1
    waited_s = wait_until(lambda: is_idle(limited), "the queue does not end")
    assert told_s < waited_s + 0.2
    assert error["retry_after_s"] < 10 * (waited_s + told_s) + 0.1
    first.join()
    assert answers[0].status_code == 200
    # Alone a document is taken, whatever its size.
    assert limited.host.max_queued_tokens < 2 * answers[0].json()[0]["usage"]["tokens_in"]


@pytest.mark.parametrize("is_streamed", [True, False])
def test_the_speed_is_measured(limited: Server, is_streamed: bool) -> None:
    """What is told of a full queue, and what is admitted, follows from it."""
    limited.host.speed = Speed()
    began, tokens = time.monotonic(), 0
    body: dict[str, Any] = {"inputs": TEXT, "parameters": ENDLESS}
    for _ in range(3):
        response = limited.post("/summarize", body | {"stream": is_streamed})
        last = events_of(response)[-1][1] if is_streamed else response.json()[0]
        tokens += last["usage"]["tokens_in"]
    found = limited.host.speed.tokens_per_s
    assert found is not None
    assert tokens / (time.monotonic() - began) <= found < 20 * tokens / (time.monotonic() - began)
    assert is_idle(limited)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_who_leaves_frees_the_engine(limited: Server, is_streamed: bool) -> None:
    body = {"inputs": TEXT, "parameters": ENDLESS, "stream": is_streamed}
    with httpx.Client(timeout=30) as client:
        if is_streamed:
            with client.stream("POST", f"{limited.url}/summarize", json=body) as response:
                assert next(response.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{limited.url}/summarize", json=body, timeout=0.1)
    assert wait_until(lambda: is_idle(limited), "the engine works for nobody") < 1


def events_of(response: httpx.Response) -> list[tuple[str | None, Any]]:
    found = []
    for block in response.text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((lines.get("event"), json.loads(lines["data"])))
    return found


def test_a_stream_of_a_summary(limited: Server) -> None:
    body: dict[str, Any] = {"inputs": TEXT, "parameters": ENDLESS}
    (whole,) = limited.post("/summarize", body).json()
    response = limited.post("/summarize", body | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, (_, last) = events_of(response)
    assert "".join(data["token"]["text"] for _, data in pieces) == whole["summary_text"]
    assert last == whole


def test_a_stream_of_windows_tells_how_far_it_is(limited: Server) -> None:
    body: dict[str, Any] = {"inputs": TEXT * 3, "truncate": "window"}
    (whole,) = limited.post("/summarize", body).json()
    *pieces, (_, last) = events_of(limited.post("/summarize", body | {"stream": True}))
    assert last == whole
    progress = [data["progress"] for name, data in pieces if name == "progress"]
    assert progress[-1 if progress[-1]["round"] == 1 else 0]["windows"] == whole["usage"]["windows"]
    told = [data["token"]["text"] for name, data in pieces if name is None]
    assert "".join(told) == whole["summary_text"]


def test_a_stream_that_cannot_begin_is_an_error(limited: Server) -> None:
    response = limited.post("/summarize", {"inputs": "long " * 400, "stream": True})
    assert error_of(response)["type"] == "too_long"


# --- keys ---


def test_every_door_asks_for_a_key(
    model_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "_LOOK_EVERY_S", 0.0)
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{hash_key('one')} reports\n{hash_key('two')}\n")
    task = task_of("embed", model_of("embed"))
    with serving(task, KeyFile(str(file))) as server:
        schema = httpx.get(
            f"{server.url}/openapi.json", headers={"authorization": "Bearer one"}
        ).json()
        doors = [(m.upper(), path) for path, ms in schema["paths"].items() for m in ms]
        doors += [("GET", p) for p in ("/openapi.json", "/docs", "/playground", "/nowhere")]
        assert len(doors) > 8
        for method, path in doors:
            is_open = path.startswith("/health/")
            for header in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}):
                response = httpx.request(method, server.url + path, headers=header)
                assert (response.status_code == 401) != is_open, path
                if not is_open:
                    assert error_of(response)["type"] == "unauthorized"
                    assert response.headers["www-authenticate"].startswith(("Bearer", "Basic "))
        for path in ("/playground", "/docs", "/info"):
            basic = httpx.BasicAuth("anybody", "one")
            assert httpx.get(server.url + path, auth=basic).status_code == 200
        asked = httpx.get(f"{server.url}/playground").headers["www-authenticate"]
        assert asked.startswith("Basic ")
        assert server.post("/", {"inputs": TEXT}, auth=basic).status_code == 401
        for key in ("one", "two"):
            header = {"authorization": f"Bearer {key}"}
            assert server.post("/", {"inputs": TEXT}, headers=header).status_code == 200
        file.write_text(f"{hash_key('three')} new\n")
        header = {"authorization": "Bearer one"}
        assert server.post("/", {"inputs": TEXT}, headers=header).status_code == 401
        header = {"authorization": "Bearer three"}
        assert server.post("/", {"inputs": TEXT}, headers=header).status_code == 200
        file.write_text("three\n")  # no hash: the last good keys stay
        assert server.post("/", {"inputs": TEXT}, headers=header).status_code == 200


@pytest.mark.parametrize("text", ["", "# none\n", "secret\n", "\x00"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(Refused, match="keys"):
        KeyFile(str(tmp_path / "keys"))
    with pytest.raises(Refused, match="cannot be read"):
        KeyFile(str(tmp_path / "missing"))


def test_no_text_and_no_key_in_logs(
    model_of: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{hash_key('sesame')} reports\n")
    with (
        caplog.at_level("INFO"),
        serving(task_of("embed", model_of("embed")), KeyFile(str(file))) as server,
    ):
        header = {"authorization": "Bearer sesame", "x-request-id": "r-1"}
        server.post("/", {"inputs": "marker words"}, headers=header)
        server.post("/", {"inputs": "marker", "wrong": "marker"}, headers=header)
        wait_until(lambda: caplog.text.count("r-1") == 2, "the log lacks a request")
    assert "marker" not in caplog.text
    assert "sesame" not in caplog.text
    assert "key=reports" in caplog.text
