"""The API: a plain FastAPI application over a service. It runs with Ray Serve and without.

>>> host = EngineHost(task, device="cpu", max_queued_tokens=100_000)
>>> app = make_app(Service(task, host, ServeOptions(model="led")))
>>> uvicorn.run(app, host="127.0.0.1")
"""

import base64
import hashlib
import importlib.metadata
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    StreamingResponse,
)
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from longformer_core.scheduling.handle import Tokens
from pipelines.serve import api, openai
from pipelines.serve.backend import Progress
from pipelines.serve.errors import STATUS, ApiError
from pipelines.serve.middleware import Guard, Keys
from pipelines.serve.service import Answer, Service
from pipelines.serve.shapes import Ask, Shape, config_of, shape_of
from pipelines.serve.streams import TextStream, event
from pipelines.tasks.preparation import tokenizer_of
from pipelines.tasks.summarize import Summarize

if TYPE_CHECKING:
    from pipelines.serve.exposition import Exposition

logger = logging.getLogger(__name__)

# The schema of one event.
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    "required": ["data"],
}
_STREAM = {"text/event-stream": {"schema": _EVENT}}


def make_app(
    service: Service, keys: Keys | None = None, exposition: "Exposition | None" = None
) -> FastAPI:
    """Return the API of a service.

    keys: None lets everybody in. exposition: what /metrics says; None: there is no such route.
    """
    task = service.task
    app = FastAPI(
        title=f"Longhaul: {service.name}",
        version=_version(),
        responses={code: {"model": api.Error} for code in sorted({*STATUS.values()} - {500})},
        redirect_slashes=False,
        docs_url="/docs",
        redoc_url=None,
    )
    app.state.service = service
    _add_errors(app)
    _add_task(app, service, shape_of(task))
    if task.name == "summarize":
        _add_completions(app, service)
    if task.name == "embed":
        _add_embeddings(app, service)
    _add_information(app, service)
    if exposition is not None:

        @app.get("/metrics", response_class=PlainTextResponse)
        async def metrics() -> str:
            return await exposition.text()

    _add_limits(app, task)
    app.add_middleware(Guard, options=service.options, keys=keys, metrics=service.metrics)
    if service.options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
        )
    return app


def _add_task(app: FastAPI, service: Service, shape: Shape) -> None:
    """Hugging Face's clients post to the very URL they are given, so the root answers, too."""

    async def run(body: Any, request: Request) -> Response:
        ask = shape.ask(service.task, body)
        if getattr(body, "stream", False):
            pieces = service.stream(ask.task, ask.rows[0], ask.timeout_s)
            return await _streamed(_summary_events(service, pieces), request)
        return await _answered(service, ask)

    run.__annotations__["body"] = shape.request
    responses: Any = {200: {"content": _STREAM}} if service.task.name == "summarize" else {}
    for path, is_shown in ((shape.path, True), ("/", True), ("", False)):
        app.add_api_route(
            path or "",
            run,
            methods=["POST"],
            response_model=shape.response,
            responses=responses,
            include_in_schema=is_shown,
            name=f"{service.task.name}{' at the root' if path != shape.path else ''}",
        )


def _add_completions(app: FastAPI, service: Service) -> None:
    async def run(body: Any, request: Request) -> Response:
        ask = openai.ask_completion(service, body)
        if body.stream:
            pieces = service.stream(ask.task, ask.rows[0], ask.timeout_s)
            return await _streamed(openai.stream_completion(service, body, ask, pieces), request)
        return await _answered(service, ask)

    async def completions(body: openai.CompletionRequest, request: Request) -> Response:
        return await run(body, request)

    async def chat_completions(body: openai.ChatRequest, request: Request) -> Response:
        return await run(body, request)

    for path, route in (
        ("/v1/completions", completions),
        ("/v1/chat/completions", chat_completions),
    ):
        app.post(path, response_model=openai.Completion, responses={200: {"content": _STREAM}})(
            route
        )


def _add_embeddings(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings", response_model=openai.Embeddings)
    async def embeddings(body: openai.EmbeddingsRequest) -> Response:
        return await _answered(service, openai.ask_embeddings(service, body))


def _add_limits(app: FastAPI, task: Any) -> None:
    """Let the schema say what this model can: how much it writes, how long its vectors are."""
    schemas = app.openapi().get("components", {}).get("schemas", {})

    def limit(name: str, **limits: int) -> None:
        for schema in schemas.values():
            for choice in schema.get("properties", {}).get(name, {}).get("anyOf", ()):
                if choice.get("type") == "integer":
                    choice.update(limits)

    if isinstance(task, Summarize):
        most = config_of(task.model).max_decoder_position_embeddings
        for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
            limit(name, maximum=most)
    if task.name == "embed":
        limit("dimensions", minimum=task.size, maximum=task.size)


def _add_information(app: FastAPI, service: Service) -> None:
    began, task, options = time.time(), service.task, service.options

    @app.get("/v1/models", response_model=openai.Models)
    async def models() -> Any:
        return openai.models(service, began)

    @app.get("/v1/models/{name}", response_model=openai.Model)
    async def model(name: str) -> Any:
        if name != service.name:
            raise ApiError("model_not_found", f"{name!r} is not served here")
        return openai.models(service, began)["data"][0]

    @app.post("/tokenize", response_model=api.Tokenized)
    def tokenize(body: api.TokenizeRequest) -> Any:
        ids = [int(i) for i in tokenizer_of(task.model).encode(body.inputs)]
        return {"ids": ids, "count": len(ids)}

    @app.get("/info", response_model=api.Info)
    async def info() -> Any:
        labels = getattr(task, "labels", None)
        return {
            "model": service.name,
            "task": task.name,
            "generates": isinstance(task, Summarize),
            "dtype": task.dtype,
            "version": _version(),
            "labels": list(labels) if labels and task.name in ("classify", "tag") else None,
            "max_source_tokens": task.max_source_tokens,
            "window_tokens": task.window_tokens,
            "stride_tokens": task.stride_tokens,
            "truncate": options.truncate,
            "max_body_bytes": options.max_body_bytes,
            "max_items": options.max_items,
            "timeout_s": options.timeout_s,
            "max_queued_tokens": options.queued_tokens(task.max_source_tokens),
        }

    page = (Path(__file__).parent / "playground.html").read_text(encoding="utf-8")
    policy = _policy_of(page)

    @app.get("/playground", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/health/live", response_model=api.Health)
    async def live() -> Any:
        return {"status": "live"}

    @app.get("/health/ready", response_model=api.Health)
    async def ready() -> Any:
        try:
            await service.backend.check()
        except RuntimeError as error:
            raise ApiError("not_ready", str(error), 1.0) from None
        return {"status": "ready"}


async def _answered(service: Service, ask: Ask) -> Response:
    answers = await service.answer(ask.task, ask.rows, ask.timeout_s)
    return JSONResponse(ask.render(answers), headers=usage_headers(answers))


async def _streamed(events: AsyncGenerator[bytes], request: Request) -> Response:
    """Return a stream; what goes wrong before its first event is an answer as any other."""
    try:
        first = await anext(events)
    except BaseException:
        await events.aclose()
        raise

    async def rest() -> AsyncGenerator[bytes]:
        async with aclosing(events):
            yield first
            try:
                async for each in events:
                    yield each
            except ApiError as error:
                yield event(error.body(request.state.request_id), "error")
            except Exception as error:
                logger.error("stream %s failed: %s", request.state.request_id, type(error).__name__)
                logger.debug("stream %s", request.state.request_id, exc_info=error)
                error = ApiError("internal", "something went wrong here")
                yield event(error.body(request.state.request_id), "error")

    return StreamingResponse(
        rest(), media_type="text/event-stream", headers={"cache-control": "no-store"}
    )


async def _summary_events(
    service: Service, pieces: AsyncGenerator[Tokens | Progress | Answer]
) -> AsyncGenerator[bytes]:
    text = TextStream(tokenizer_of(service.task.model))
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Tokens):
                if new := text.add(piece.ids):
                    yield event({"token": {"text": new}})
            elif isinstance(piece, Progress):
                done = {"round": piece.level, "done": piece.done, "windows": piece.windows}
                yield event({"progress": done}, "progress")
            else:
                if rest := text.rest(piece.columns["summary"]):
                    yield event({"token": {"text": rest}})
                summary, usage = piece.columns["summary"], piece.usage.model_dump()
                yield event({"summary_text": summary, "usage": usage})


def usage_headers(answers: list[Answer]) -> dict[str, str]:
    usages = [answer.usage for answer in answers]
    return {
        "x-longhaul-tokens": str(sum(usage.tokens_in for usage in usages)),
        "x-longhaul-tokens-out": str(sum(usage.tokens_out or 0 for usage in usages)),
        "x-longhaul-windows": str(sum(usage.windows for usage in usages)),
        "x-longhaul-truncated": str(any(usage.truncated for usage in usages)).lower(),
        "x-longhaul-coverage": f"{min(usage.coverage for usage in usages):.6g}",
    }


def _add_errors(app: FastAPI) -> None:
    """Every error has one shape, and none repeats what was sent."""

    def answer(request: Request, error: ApiError) -> Response:
        request.state.error = error.kind
        return JSONResponse(
            error.body(request.state.request_id), error.status, headers=error.headers()
        )

    @app.exception_handler(ApiError)
    async def of_ours(request: Request, error: ApiError) -> Response:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def of_bodies(request: Request, error: RequestValidationError) -> Response:
        return answer(request, _refusal(error))

    @app.exception_handler(HTTPException)
    async def of_routes(request: Request, error: HTTPException) -> Response:
        kinds: dict[int, tuple[str, str]] = {
            404: ("not_found", "there is no such route; /docs lists them"),
            405: ("method_not_allowed", "this route answers other methods; /docs lists them"),
        }
        kind, message = kinds.get(error.status_code, ("malformed", "the request cannot be read"))
        response = answer(request, ApiError(kind, message))
        response.headers.update(error.headers or {})  # Allow
        return response


def _refusal(error: RequestValidationError) -> ApiError:
    """Return what is wrong with a body, without its texts."""
    found = error.errors()
    if any(each["type"] == "json_invalid" for each in found):
        return ApiError("malformed", "the body is not JSON")
    said, kind = [], "invalid"
    for each in found[:10]:
        place = ".".join(str(part) for part in each["loc"][1:]) or "body"
        message = each["msg"]
        if each["type"] == "string_pattern_mismatch":
            message, kind = "is empty or blank", "empty"
        said.append(f"{place}: {message}")
    return ApiError(kind, "; ".join(said))


def _policy_of(page: str) -> str:
    """Return what a browser lets the page do: run its own script, and ask this server."""
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _version() -> str:
    try:
        return importlib.metadata.version("longhaul")
    except importlib.metadata.PackageNotFoundError:
        return "0"
