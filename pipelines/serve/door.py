"""A middleware inside Serve's proxy: mends what no gateway can reach.

Headers that would steer or crash the proxy are dropped, its plain-text errors become our JSON, and
a request whose gateway died before it answered goes to another one. It is optional: keys and limits
are the gateway's. Serve finds it by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH (`CALLBACK`).
"""

import asyncio
import re

from starlette.middleware import Middleware

from pipelines.serve.asgi import App, Message, Receive, Scope, Send, request_id_of, send_error
from pipelines.serve.errors import ApiError
from pipelines.serve.streams import event

CALLBACK = "pipelines.serve.door.middlewares"

# What Serve takes from clients: time limits, routing, and that nobody is cancelled.
_STEERING = re.compile(
    rb"x-request-timeout-seconds|x-request-disconnect-disabled|"
    rb"(x[-_])?serve[-_]multiplexed[-_]model[-_]id|(x[-_])?(serve[-_])?session[-_]id",
    re.IGNORECASE,
)
# A larger body is not kept, and its request is not sent again.
_MOST_KEPT = 16 * 2**20
_TRIES = 3
_PAUSE_S = 0.2
# What the proxy itself answers with.
_KINDS = {
    404: ("not_found", "no application is served here"),
    408: ("deadline", "the request was not done in the server's time"),
    429: ("overloaded", "too many requests wait"),
    503: ("not_ready", "no replica can answer yet"),
}
_DIED = ("not_ready", "the process that held the request died; send it again")


def middlewares() -> list[Middleware]:
    """Return what Serve puts around its proxy."""
    return [Middleware(Door)]


class Door:
    """See the module."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _clean(scope)
        if scope["path"] == "/-/routes":
            await send_error(send, ApiError("not_found", "there is no such route"), request_id)
            return
        body = _Body(receive)
        for number in range(1, _TRIES + 1):
            answer = _Answer(send, request_id)
            await self._app({**scope}, body.replay(), answer)
            if await answer.end() or body.is_gone:
                return
            if not body.is_whole:
                break
            await asyncio.sleep(_PAUSE_S * number)
        await send_error(send, ApiError(*_DIED, 1.0), request_id)


class _Body:
    """A request's messages, kept so that they can be read again.

    is_whole: it can. is_gone: the client left.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._size = 0
        self.is_whole, self.is_gone = True, False

    def replay(self) -> Receive:
        """Return a `receive` that begins with what was read already."""
        place = 0

        async def receive() -> Message:
            nonlocal place
            if place < len(self._kept):
                place += 1
                return self._kept[place - 1]
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.is_gone = True
                return message
            self._size += len(message.get("body", b""))
            if self._size > _MOST_KEPT:
                self.is_whole = False
                self._kept.clear()
            if self.is_whole:
                self._kept.append(message)
                place += 1
            return message

        return receive


class _Answer:
    """Lets a gateway's answer through, but for one that breaks off before its body begins.

    The proxy's own errors become JSON, and a stream that breaks off ends in an error event.
    """

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self._start: Message | None = None
        self._has_begun = self._is_done = False

    async def __call__(self, message: Message) -> None:
        if self._is_done:
            return
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            if message["status"] in _KINDS and not kind.startswith(b"application/json"):
                self._has_begun = self._is_done = True
                retry_s = 1.0 if message["status"] in (429, 503) else None
                error = ApiError(*_KINDS[message["status"]], retry_s)
                await send_error(self._send, error, self._request_id)
                return
            # The gateway and the proxy each say it.
            own = (b"x-request-id", self._request_id.encode())
            kept = [h for h in message.get("headers", ()) if h[0].lower() != own[0]]
            self._start = {**message, "headers": [*kept, own]}
            return
        if not self._has_begun and self._start is not None:
            self._has_begun = True
            await self._send(self._start)
        self._is_done = not message.get("more_body", False)
        await self._send(message)

    async def end(self) -> bool:
        """Return whether the client has an answer; one that broke off cannot be taken back."""
        if self._has_begun and not self._is_done and self._start is not None:
            kind = dict(self._start["headers"]).get(b"content-type", b"")
            if kind.startswith(b"text/event-stream"):
                body = event(ApiError(*_DIED, 1.0).body(self._request_id), "error")
                await self._send({"type": "http.response.body", "body": body})
        return self._has_begun


def _clean(scope: Scope) -> str:
    """Drop headers that steer Serve or that its proxy cannot read; return the request's id."""
    given, kept = b"", []
    for name, value in scope["headers"]:
        if name.lower() == b"x-request-id":
            given = value
        elif not _STEERING.fullmatch(name) and name.isascii():
            kept.append((name, value))
    request_id = request_id_of(given)
    scope["headers"] = [*kept, (b"x-request-id", request_id.encode())]
    return request_id
