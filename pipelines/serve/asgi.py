"""What both middlewares speak: ASGI's types, a request's id, and an error as an answer."""

import json
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from pipelines.serve.errors import ApiError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def request_id_of(given: bytes) -> str:
    """Return the id that a client gave its request, or a new one where it is none for a log."""
    return given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def send_error(
    send: Send, error: ApiError, request_id: str, headers: Mapping[str, str] | None = None
) -> None:
    """Send an error as a whole answer. headers: in place of the error's own."""
    body = json.dumps(error.body(request_id)).encode()
    said = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": request_id,
        **(error.headers() if headers is None else headers),
    }
    encoded = [(name.encode(), value.encode()) for name, value in said.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
