"""Documents, and an engine that stops where a test wants it to: what its tests share."""

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine
from longformer_core.generation.request import Generation, GenerationHandle, Request
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.scheduling.handle import Tokens
from tests.longformer_core.generation.helpers import Watched, documents, models

NAN_TOKEN, POISON_TOKEN = 3, 1
GREEDY = GenerationConfig(max_new_tokens=16)
LONG = GenerationConfig(max_new_tokens=38, min_new_tokens=38)
BEAMS = GenerationConfig(max_length=17, num_beams=4)
LONG_BEAMS = GenerationConfig(max_new_tokens=38, min_new_tokens=38, num_beams=2)
MIXED = (
    GREEDY,
    BEAMS,
    GenerationConfig(
        max_length=14, num_beams=2, no_repeat_ngram_size=2, encoder_no_repeat_ngram_size=2
    ),
    GenerationConfig(max_new_tokens=12, do_sample=True, top_k=30, num_return_sequences=2),
    GenerationConfig(max_new_tokens=5, output_scores=True),
    GenerationConfig(
        max_length=9, num_beams=4, length_penalty=2.0, num_return_sequences=3, output_scores=True
    ),
    GenerationConfig(max_new_tokens=10, num_beams=2, do_sample=True),
    GenerationConfig(max_new_tokens=30, no_repeat_ngram_size=1, repetition_penalty=1.3),
)
NUM_TEXTS = 24
# What nobody should ever wait for.
PATIENCE_S = 120.0
TEXTS = documents(7, *(3 + 11 * i % 67 for i in range(NUM_TEXTS)))


@functools.cache
def fragile() -> LEDForConditionalGeneration:
    """A model that makes NaN of every document with `NAN_TOKEN`, and of no other.

    The embedding is untied, or the broken row would reach every document through the logits.
    """
    model = copy.deepcopy(models(3)[0])
    encoder = model.led.encoder
    encoder.embed_tokens = copy.deepcopy(encoder.embed_tokens)
    with torch.no_grad():
        encoder.embed_tokens.weight[NAN_TOKEN] = float("nan")
    return model


def request_of(text: int, option: int, bad_token: int | None = None) -> Request:
    """The same document for the same numbers; some have global tokens, some hidden ones."""
    ids = list(TEXTS[text])
    if bad_token is not None:
        ids[1] = bad_token
    positions = [0, len(ids) // 2] if text % 5 == 0 else None
    valid = [i % 4 != 3 for i in range(len(ids))] if text % 7 == 0 else None
    return Request(ids, MIXED[option], positions, seed=text, valid=valid)


def give(engine: Engine, request: Request, deadline_s: float | None = None) -> GenerationHandle:
    return engine.add(
        request.input_ids,
        request.options,
        deadline_s,
        global_positions=request.global_positions,
        seed=request.seed,
        valid=request.valid,
    )


@functools.cache
def alone(text: int, option: int) -> Generation:
    outcome = give(Engine(fragile()), request_of(text, option)).result(PATIENCE_S)
    assert outcome.error is None
    return outcome


def no_engine_thread() -> bool:
    return not any(thread.name == "longhaul-engine" for thread in threading.enumerate())


class Listener(threading.Thread):
    """Collects a document's events on a thread of its own."""

    def __init__(self, handle: GenerationHandle) -> None:
        super().__init__(daemon=True)
        self.handle = handle
        self.ids: list[int] = []
        self.last: Generation | None = None
        self.start()

    def run(self) -> None:
        for event in self.handle.events(PATIENCE_S):
            if isinstance(event, Tokens):
                assert event.ids
                self.ids += event.ids
            else:
                self.last = event


def hold_at(model: Watched, step: int) -> tuple[threading.Event, threading.Event]:
    """Let the engine wait before a step, from 1: return what says it is there, and the way on."""
    is_there, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        if len(model.rows) == step:
            is_there.set()
            assert go_on.wait(PATIENCE_S)

    model.before_step.append(wait)
    return is_there, go_on


def at_step(model: Watched, step: int, action: Callable[[], Any]) -> None:
    """Do something before a step, from 1."""

    def act() -> None:
        if len(model.rows) == step:
            action()

    model.before_step.append(act)


def raiser(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def listen_from_now(handle: GenerationHandle) -> None:
    with pytest.raises(TimeoutError, match="no token for 0 s"):
        next(handle.events(timeout_s=0))


def texts_of(handles: list[GenerationHandle]) -> list[list[list[int]]]:
    outcomes = [handle.result(PATIENCE_S) for handle in handles]
    assert [outcome.error for outcome in outcomes] == [None] * len(handles)
    return [outcome.sequences for outcome in outcomes]


def alone_text(text: int) -> list[list[int]]:
    return texts_of([Engine(models(3)[0]).add(TEXTS[text], GREEDY)])[0]
