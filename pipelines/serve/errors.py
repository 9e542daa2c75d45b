"""What a request can be refused with: one JSON shape, and one table of status codes.

    {"error": {"message", "type", "code", "request_id", "retry_after_s"?}}

| code | type                              | when                                                 |
|------|-----------------------------------|------------------------------------------------------|
| 400  | malformed                         | the body is not JSON                                 |
| 401  | unauthorized                      | no key, or a wrong one                               |
| 404  | not_found, model_not_found        | no such route; a model that is not served here       |
| 405  | method_not_allowed                | a route that answers other methods                   |
| 408  | slow_body                         | the body did not come in time                        |
| 413  | too_large                         | too many bytes or items                              |
| 415  | unsupported_encoding              | a compressed body                                    |
| 422  | invalid, too_long, empty, no_mask | a field, its value, the limit and what to do         |
| 424  | inference                         | the model failed on this document                    |
| 429  | overloaded                        | too much waits; Retry-After says when to come back   |
| 500  | internal                          | our mistake; the log has it, the answer does not     |
| 503  | not_ready, worker_died            | no replica yet, or they died while they computed it  |
| 504  | deadline                          | the request's own deadline passed                    |
"""

import math
from typing import Any

from longformer_core.errors import (
    CancelledError,
    ConfigError,
    DeadlineError,
    NonFiniteError,
    OutOfMemoryError,
    ShapeError,
    TooLongError,
)

STATUS = {
    "malformed": 400,
    "unauthorized": 401,
    "not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "slow_body": 408,
    "too_large": 413,
    "unsupported_encoding": 415,
    "invalid": 422,
    "too_long": 422,
    "empty": 422,
    "no_mask": 422,
    "inference": 424,
    "overloaded": 429,
    "internal": 500,
    "not_ready": 503,
    "worker_died": 503,
    "deadline": 504,
}
# An error of a prepared row (`pipelines.rows.ERROR_TYPES`) as a type of ours.
_OF_ROWS = {"NullText": "empty", "EmptyText": "empty", "TooLong": "too_long"}


class ApiError(Exception):
    """A request that gets an error for an answer. `kind` is a type of the table above."""

    def __init__(self, kind: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.retry_after_s = kind, message, retry_after_s

    @property
    def status(self) -> int:
        return STATUS[self.kind]

    def body(self, request_id: str) -> dict[str, Any]:
        """Return the JSON of the answer."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.kind,
            "code": self.status,
            "request_id": request_id,
        }
        if self.retry_after_s is not None:
            error["retry_after_s"] = round(self.retry_after_s, 3)
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to the error."""
        found = {}
        if self.retry_after_s is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.kind == "unauthorized":
            found["www-authenticate"] = "Bearer"
        return found


def of_row(error: dict[str, str], where: str) -> ApiError:
    """Return what a document's preparation refused it for."""
    kind = _OF_ROWS.get(error["type"], "invalid")
    message = f"{where}: {error['message']}"
    if kind == "too_long":
        message += '; or set "truncate" to "left", "right" or "window"'
    return ApiError(kind, message)


def of_document(error: Exception) -> ApiError:
    """Return what a document's computation ended with."""
    if isinstance(error, DeadlineError):
        return ApiError("deadline", str(error))
    if isinstance(error, CancelledError):
        return ApiError("not_ready", "the server ends and begins no document", 1.0)
    if isinstance(error, TooLongError):
        return ApiError("too_long", str(error))
    if isinstance(error, ConfigError | ShapeError):
        return ApiError("invalid", str(error))
    name = "ModelError"
    if isinstance(error, NonFiniteError | OutOfMemoryError):
        name = type(error).__name__.removesuffix("Error")
    return ApiError("inference", f"{name}: {error}")
