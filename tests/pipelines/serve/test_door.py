"""The middleware in Serve's proxy, around applications that answer, fail and die."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from pipelines.serve.door import Door


class Proxy:
    """Answers as told, one answer a try; remembers what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)
        self.bodies: list[bytes] = []
        self.headers: list[dict[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        self.headers.append(dict(scope["headers"]))
        for message in self._answers.pop(0):
            await send(message)


def start(status: int, kind: str) -> dict[str, Any]:
    headers = [(b"content-type", kind.encode())]
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(text: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


GOOD = [start(200, "application/json"), body(b"{}")]


def ask(proxy: Proxy, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(Door(proxy))
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            return await client.post("/", **options)

    return asyncio.run(send())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.serve.door._PAUSE_S", 0.0)


def test_a_gateway_that_dies_before_it_answers_costs_nothing() -> None:
    proxy = Proxy([], [start(200, "application/json")], GOOD)
    response = ask(proxy, content=b"text")
    assert (response.status_code, response.json()) == (200, {})
    assert proxy.bodies == [b"text"] * 3


def test_gateways_that_keep_dying() -> None:
    response = ask(Proxy([], [], []))
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "not_ready"


def test_a_stream_that_breaks_off_says_so() -> None:
    begun = [start(200, "text/event-stream"), body(b"data: 1\n\n", more=True)]
    response = ask(Proxy(begun))
    first, last = response.text.strip().split("\n\n")
    assert first == "data: 1"
    name, data = last.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "not_ready"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, "not_found"), (408, "deadline"), (429, "overloaded"), (503, "not_ready")],
)
def test_the_proxys_own_errors_become_ours(status: int, kind: str) -> None:
    response = ask(Proxy([start(status, "text/plain"), body(b"oh")]))
    error = response.json()["error"]
    assert (error["type"], error["code"]) == (kind, response.status_code)
    assert error["request_id"] == response.headers["x-request-id"]
    passed = ask(Proxy([start(status, "application/json"), body(b'{"error": 1}')]))
    assert (passed.status_code, passed.json()) == (status, {"error": 1})


def test_headers_that_steer_or_crash_the_proxy_are_dropped() -> None:
    proxy = Proxy(GOOD)
    given = {
        b"x-request-timeout-seconds": b"60",
        b"X-Request-Disconnect-Disabled": b"?1",
        b"serve_multiplexed_model_id": b"\xff",
        b"x-session-id": b"\xff",
        b"x-request-id": b"\xff\xfe",
        b"authorization": b"Bearer a",
    }
    ask(proxy, headers=given)
    (found,) = proxy.headers
    assert found[b"authorization"] == b"Bearer a"
    assert found[b"x-request-id"].isascii()
    assert not {name.lower() for name in given} & {*found} - {b"authorization", b"x-request-id"}
