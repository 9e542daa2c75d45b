"""What stands around every route: request ids, keys, limits of bodies, disconnects, errors.

A plain ASGI middleware: it reads the whole body within its limits before anything else looks at it,
and cancels the work of a client that left.
"""

import asyncio
import base64
import logging
import time
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.serve.asgi import App, Message, Receive, Scope, Send, request_id_of, send_error
from pipelines.serve.errors import ApiError
from pipelines.serve.options import ServeOptions

if TYPE_CHECKING:
    from pipelines.serve.metrics import Metrics

logger = logging.getLogger(__name__)

# Answered without a key: who asks whether we live has none.
OPEN_PATHS = ("/health/live", "/health/ready")
# What people open in a browser, which asks them for the key.
PAGES = ("/playground", "/docs")


class Keys(Protocol):
    """Who may come in."""

    def name_of(self, key: str) -> str | None:
        """Return under which name a key is known in logs; None for one that is not known."""
        ...


class Guard:
    """See the module. `keys` None lets everybody in."""

    def __init__(
        self,
        app: App,
        *,
        options: ServeOptions,
        keys: Keys | None = None,
        metrics: "Metrics | None" = None,
    ) -> None:
        self._app, self._options, self._keys, self._metrics = app, options, keys, metrics
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {k.lower().decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        request_id = request_id_of(headers.get("x-request-id", "").encode())
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        answer = _Answer(send, request_id)
        began = time.monotonic()
        self._num_requests += 1
        try:
            try:
                self._check(scope, headers, state)
                body = await self._read(headers, receive)
                await self._run(scope, body, receive, answer)
            except ApiError as error:
                state["error"] = error.kind
                await answer.error(error, is_page=scope["path"].endswith(PAGES))
            except Exception as error:
                # The text of an exception may hold a document.
                logger.error("request %s failed: %s", request_id, type(error).__name__)
                logger.debug("request %s", request_id, exc_info=error)
                await answer.error(ApiError("internal", "something went wrong here"))
        finally:
            self._num_requests -= 1
            self._note(scope, answer.status, time.monotonic() - began)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        logger.info(
            "%s %s %s %d %.0f ms key=%s",
            state["request_id"],
            scope["method"],
            _printable(scope["path"]),
            status,
            1000 * seconds,
            state.get("key", "-"),
        )
        if self._metrics is not None:
            # Paths that nobody serves are one series.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.count("requests", route=route, status=status, type=state.get("error", ""))
            self._metrics.count("request_seconds", seconds, route=route)
            self._metrics.observe("latency", seconds, route=route)

    def _check(self, scope: Scope, headers: dict[str, str], state: dict[str, Any]) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path in OPEN_PATHS:
            return
        if self._keys is not None:
            key = _key_of(headers.get("authorization", ""), scope["method"])
            name = None if key is None else self._keys.name_of(key)
            if name is None:
                raise ApiError("unauthorized", "send a key: Authorization: Bearer KEY")
            state["key"] = name
        if self._num_requests > self._options.max_requests:
            raise ApiError(
                "overloaded", f"{self._options.max_requests} requests are answered already", 1.0
            )

    async def _read(self, headers: dict[str, str], receive: Receive) -> bytes:
        limit = self._options.max_body_bytes
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError("unsupported_encoding", "content-encoding: send the body as it is")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise _too_large(limit)
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self._options.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError("malformed", "the connection closed before the body's end")
                    chunk = message.get("body", b"")
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > limit:
                        raise _too_large(limit)
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                "slow_body", f"the body did not arrive within {self._options.body_timeout_s:g} s"
            ) from None

    async def _run(self, scope: Scope, body: bytes, receive: Receive, answer: "_Answer") -> None:
        """Let the routes answer; cancel them when the client leaves."""
        left = asyncio.Event()
        is_read = False

        async def replay() -> Message:
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        work = asyncio.ensure_future(self._app(scope, replay, answer))
        watcher = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for each in (work, watcher):
                each.cancel()
            await asyncio.gather(work, watcher, return_exceptions=True)


class _Answer:
    """Sends an answer with its request id; an error only where nothing was sent before."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self.status = 499  # the client left
        self._has_begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun, self.status = True, message["status"]
            own = (b"x-request-id", self._request_id.encode())
            kept = [each for each in message.get("headers", ()) if each[0] != own[0]]
            message = {**message, "headers": [*kept, own]}
        await self._send(message)

    async def error(self, error: ApiError, *, is_page: bool = False) -> None:
        if self._has_begun:
            return
        own = error.headers()
        if is_page and "www-authenticate" in own:
            own["www-authenticate"] = 'Basic realm="longhaul: any name, the key for a password"'
        await send_error(self, error, self._request_id, own)


def _key_of(authorization: str, method: str) -> str | None:
    """Return the key that a request shows: a bearer's, or of a browser that reads pages.

    A browser asks its user for a password and sends it along from then on, also where another
    site's page makes it: so it may read, and not have documents computed.
    """
    kind, _, given = authorization.partition(" ")
    if kind.lower() == "bearer":
        return given.strip()
    if kind.lower() == "basic" and method == "GET":
        try:
            return base64.b64decode(given, validate=True).decode().partition(":")[2]
        except ValueError:
            return None
    return None


def _too_large(limit: int) -> ApiError:
    return ApiError("too_large", f"the body is larger than {limit} bytes; send less at once")


def _printable(path: str) -> str:
    return path.encode("ascii", "backslashreplace").decode()[:200]
