"""OpenAI's shapes: embeddings, completions and chat completions.

A completion is a summary of its prompt; of a chat the last user message is the document. Fields
that would change the output and have no effect here are refused unless they are neutral.
"""

import base64
import functools
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from longformer_core.scheduling.handle import Tokens
from pipelines.serve.api import (
    Beams,
    No,
    NotNegative,
    Number,
    One,
    Positive,
    Request,
    Seed,
    Share,
    Strict,
    Text,
    TokenId,
    Warmth,
    Zero,
)
from pipelines.serve.backend import Progress
from pipelines.serve.errors import ApiError
from pipelines.serve.options import with_options
from pipelines.serve.service import Answer, Service
from pipelines.serve.shapes import Ask, check_dimensions, summarizer
from pipelines.serve.streams import TextStream, event
from pipelines.tasks.preparation import tokenizer_of


class EmbeddingsRequest(Request):
    model: str
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Positive | None = None
    user: str | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Completing(Request):
    """What completions and chats share. Without a temperature the model decodes as published."""

    model: str
    max_tokens: Positive | None = None
    temperature: Warmth | None = Field(
        None, description="Above 0: sampling. Default: the model's own search."
    )
    top_p: Share | None = None
    seed: Seed | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: One | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logprobs: No | None = None
    stop: Annotated[list[str], Field(max_length=0)] | None = None
    user: str | None = None
    # Beyond OpenAI's.
    num_beams: Beams | None = None
    min_length: NotNegative | None = None
    length_penalty: Number | None = None
    no_repeat_ngram_size: NotNegative | None = None


class CompletionRequest(Completing):
    prompt: Text
    suffix: None = None
    echo: No | None = None
    best_of: One | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @property
    def text(self) -> str:
        """The message's text; parts are paragraphs."""
        if isinstance(self.content, str):
            return self.content
        return "\n\n".join(part.text for part in self.content)


class ChatRequest(Completing):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None


class Counts(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = None
    truncated: bool | None = None
    coverage: float | None = None
    windows: int | None = None


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Counts


class Completion(BaseModel):
    id: str
    object: Literal["text_completion", "chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Counts | None


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


def ask_embeddings(service: Service, body: EmbeddingsRequest) -> Ask:
    """Return what is to be embedded; token ids stand for the text that they decode to."""
    _check_model(service, body.model)
    check_dimensions(service.task, body.dimensions)
    given = body.input
    texts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else [*given]
    if not isinstance(texts[0], str):
        tokenizer = tokenizer_of(service.task.model)
        size = len(tokenizer)
        for ids in texts:
            if max(ids) >= size:
                raise ApiError("invalid", f"input: token {max(ids)}; ids are below {size}")
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in texts]
    rows = [{"text": text} for text in texts]
    render = functools.partial(_embeddings, service.name, body.encoding_format)
    return Ask(with_options(service.task, body.truncate), rows, render, body.timeout_s)


def _embeddings(model: str, encoding_format: str, answers: list[Answer]) -> dict[str, Any]:
    vectors = [np.asarray(answer.columns["embedding"], "<f4") for answer in answers]
    return {
        "object": "list",
        "model": model,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.tobytes()).decode()
                if encoding_format == "base64"
                else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ],
        "usage": _usage(answers),
    }


def ask_completion(service: Service, body: CompletionRequest | ChatRequest) -> Ask:
    _check_model(service, body.model)
    if isinstance(body, ChatRequest):
        texts = [message.text for message in body.messages if message.role == "user"]
        if not texts or not texts[-1].strip():
            raise ApiError("empty", "messages: the last user message is the document; give one")
        text, limit = texts[-1], body.max_completion_tokens or body.max_tokens
    else:
        text, limit = body.prompt, body.max_tokens
    decoding = body.model_dump(
        include={"num_beams", "min_length", "length_penalty", "no_repeat_ngram_size", "seed"},
        exclude_none=True,
    )
    if limit is not None:
        decoding["max_new_tokens"] = limit
    if body.temperature:
        decoding |= {"do_sample": True, "temperature": max(0.01, body.temperature)}
        decoding.setdefault("num_beams", 1)
        if body.top_p is not None:
            decoding["top_p"] = body.top_p
    task = summarizer(service.task, body.truncate, decoding)
    is_chat = isinstance(body, ChatRequest)

    def render(answers: list[Answer]) -> dict[str, Any]:
        (answer,) = answers
        text = answer.columns["summary"]
        said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        reason = _finish_reason(task, answer)
        return _head(service, body, is_chunk=False) | {
            "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}],
            "usage": _usage(answers),
        }

    return Ask(task, [{"text": text}], render, body.timeout_s)


async def stream_completion(
    service: Service,
    body: CompletionRequest | ChatRequest,
    ask: Ask,
    pieces: AsyncGenerator[Tokens | Progress | Answer],
) -> AsyncGenerator[bytes]:
    """Yield chunks of a completion, the usage if asked for, and `[DONE]`."""
    is_chat = isinstance(body, ChatRequest)
    head = _head(service, body, is_chunk=True)
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)
    text = TextStream(tokenizer_of(service.task.model))

    def chunk(said: str, reason: str | None = None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if is_chat:
            choice["delta"] = {"role": "assistant", "content": said}
        else:
            choice["text"] = said
        return event(head | {"choices": [choice]} | ({"usage": None} if wants_usage else {}))

    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Tokens):
                if new := text.add(piece.ids):
                    yield chunk(new)
            elif isinstance(piece, Progress):
                # A comment: the shape has no room, and the connection stays alive.
                yield f": round {piece.level}, window {piece.done} of {piece.windows}\n\n".encode()
            else:
                yield chunk(text.rest(piece.columns["summary"]), _finish_reason(ask.task, piece))
                if wants_usage:
                    yield event(head | {"choices": [], "usage": _usage([piece])})
                yield event("[DONE]")


def models(service: Service, began: float) -> dict[str, Any]:
    model = {
        "id": service.name, "object": "model", "created": int(began), "owned_by": "longhaul"
    }  # fmt: skip
    return {"object": "list", "data": [model]}


def _check_model(service: Service, name: str) -> None:
    # huggingface_hub's client of a URL sends "dummy" for the model's name.
    if name not in (service.name, "dummy"):
        raise ApiError(
            "model_not_found", f"model: {name!r} is not served here; ask for {service.name!r}"
        )


def _head(service: Service, body: Any, *, is_chunk: bool) -> dict[str, Any]:
    kind = "text_completion"
    if isinstance(body, ChatRequest):
        kind = "chat.completion.chunk" if is_chunk else "chat.completion"
    name = f"{'chatcmpl' if isinstance(body, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": service.name}


def _finish_reason(task: Any, answer: Answer) -> str:
    generation = getattr(task, "generation", None)
    count = answer.usage.tokens_out or 0
    return "length" if generation and count >= generation.total_length - 1 else "stop"


def _usage(answers: list[Answer]) -> dict[str, Any]:
    usages = [answer.usage for answer in answers]
    tokens_in = sum(usage.tokens_in for usage in usages)
    tokens_out = sum(usage.tokens_out or 0 for usage in usages)
    return {
        "prompt_tokens": tokens_in,
        "completion_tokens": tokens_out,
        "total_tokens": tokens_in + tokens_out,
        "truncated": any(usage.truncated for usage in usages),
        "coverage": min(usage.coverage for usage in usages),
        "windows": sum(usage.windows for usage in usages),
    }
