"""Documents that come and go while others decode: each one's text is its own alone."""

import copy
import functools
import itertools
import random
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longformer_core.errors import (
    CancelledError,
    DeadlineError,
    LongformerError,
    NonFiniteError,
    OutOfMemoryError,
    ShapeError,
)
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine
from longformer_core.generation.handle import Generation, Handle, Request, Tokens
from longformer_core.generation.lane import Lane
from longformer_core.memory import available_bytes
from longformer_core.models.led import LEDForConditionalGeneration
from tests.longformer_core.generation.helpers import (
    Watched,
    documents,
    models,
    wait_until,
    watch,
)

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


def give(engine: Engine, request: Request, deadline_s: float | None = None) -> Handle:
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
    outcome = give(Engine(fragile()), request_of(text, option)).result(30)
    assert outcome.error is None
    return outcome


def no_engine_thread() -> bool:
    return not any(thread.name == "longhaul-engine" for thread in threading.enumerate())


class Listener(threading.Thread):
    """Collects a document's events on a thread of its own."""

    def __init__(self, handle: Handle) -> None:
        super().__init__(daemon=True)
        self.handle = handle
        self.ids: list[int] = []
        self.last: Generation | None = None
        self.start()

    def run(self) -> None:
        for event in self.handle.events(30):
            if isinstance(event, Tokens):
                assert event.ids
                self.ids += event.ids
            else:
                self.last = event


@dataclass
class Item:
    """A document of a drawn story: what it is, when it comes, and what happens to it."""

    text: int
    option: int
    fate: str
    come: int
    cancel: int
    listen: int | None
    handle: Handle = field(init=False)
    listener: Listener | None = None

    @property
    def request(self) -> Request:
        bad = {"nan": NAN_TOKEN, "poison": POISON_TOKEN}.get(self.fate)
        return request_of(self.text, self.option, bad)

    def start(self, engine: Engine) -> None:
        deadline_s = {"late": 0.0, "in a hurry": 0.01}.get(self.fate)
        self.handle = give(engine, self.request, deadline_s)

    def hear(self) -> None:
        self.listener = Listener(self.handle)

    def check(self) -> bool:
        """Compare with the document alone; return whether it failed without a reason."""
        outcome = self.handle.result(30)
        if self.listener is not None:
            self.listener.join(30)
            assert self.listener.last is outcome
        if outcome.error is not None:
            assert outcome.sequences == []
            expected = {
                "nan": NonFiniteError,
                "cancel": CancelledError,
                "late": DeadlineError,
                "in a hurry": DeadlineError,
            }.get(self.fate)
            if expected is not None and isinstance(outcome.error, expected):
                return False
            return not (self.fate == "poison" and "KeyError" in str(outcome.error))
        assert self.fate not in ("nan", "poison", "late")
        expected = alone(self.text, self.option)
        assert outcome.sequences == expected.sequences
        assert outcome.scores == pytest.approx(expected.scores, abs=1e-4)
        if self.listener is not None:
            assert self.listener.ids == outcome.sequences[0]
        return False


class Story:
    """Do what is due before each step of the model, and the rest when it has nothing to do."""

    def __init__(
        self, model: Watched, engine: Engine, items: list[Item], accidents: dict[int, Exception]
    ) -> None:
        due: list[tuple[int, Callable[[], None]]] = []
        for item in items:
            due.append((item.come, functools.partial(item.start, engine)))
            if item.listen is not None:
                due.append((item.come + item.listen, item.hear))
            if item.fate == "cancel":
                due.append((item.come + item.cancel, lambda item=item: item.handle.cancel()))
        # Stable, so that nothing happens to a document before it has come.
        self._due = deque(sorted(due, key=lambda pair: pair[0]))
        self._model, self._engine, self._items = model, engine, items
        self._accidents = accidents
        self.num_accidents = 0
        model.before_step = self._before_step

    def play(self) -> None:
        while self._due:
            self._due.popleft()[1]()
            self._wait()
        self._wait()

    def _wait(self) -> None:
        for item in self._items:
            if hasattr(item, "handle"):
                item.handle.result(30)

    def _before_step(self) -> None:
        self._check_plan()
        step = len(self._model.rows)
        while self._due and self._due[0][0] <= step:
            self._due.popleft()[1]()
        if step in self._accidents:
            self.num_accidents += 1
            raise self._accidents[step]

    def _check_plan(self) -> None:
        assert planned(self._engine) <= self._engine._memory_bytes


def planned(engine: Engine) -> int:
    """What the engine reckons that those that decode take."""
    return engine._held_bytes([handle for lane in engine._lanes for handle in lane.handles])


ITEMS = st.builds(
    Item,
    text=st.integers(0, NUM_TEXTS - 1),
    option=st.integers(0, len(MIXED) - 1),
    fate=st.sampled_from(
        ["good"] * 6 + ["cancel", "cancel", "late", "in a hurry", "nan", "poison"]
    ),
    come=st.sampled_from([0, 0, 0, 1, 2, 5, 9, 14, 30]),
    cancel=st.integers(0, 12),
    listen=st.sampled_from([None, None, 0, 3, 50]),
)
ACCIDENTS = st.dictionaries(
    st.integers(1, 40),
    st.sampled_from([RuntimeError("odd"), MemoryError("full"), torch.OutOfMemoryError("full")]),
    max_size=2,
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    items=st.lists(ITEMS, min_size=1, max_size=12),
    accidents=st.one_of(st.just({}), ACCIDENTS),
    batch_tokens=st.sampled_from([1, 60, 10_000]),
    max_rows=st.sampled_from([1, 4, 6, 256]),
    memory_factor=st.sampled_from([1.0, 2.5, 1000.0]),
    decodable_rows=st.sampled_from([4, 8, 10**9]),
    form=st.sampled_from(["auto", "absorbed", "projected"]),
)
def test_whatever_happens_to_others_a_documents_text_is_its_own(
    items: list[Item],
    accidents: dict[int, Exception],
    batch_tokens: int,
    max_rows: int,
    memory_factor: float,
    decodable_rows: int,
    form: Any,
) -> None:
    model = Watched(fragile())
    model.poison[POISON_TOKEN] = KeyError("bad luck")
    model.max_rows = decodable_rows
    probe = Engine(fragile(), memory_bytes=2**40, form=form)
    largest = max(probe._bytes([Handle(item.request)]) for item in items)
    engine = Engine(
        model,
        batch_tokens=batch_tokens,
        max_rows=max_rows,
        memory_bytes=int(largest * memory_factor),
        form=form,
    )
    story = Story(model, engine, items, accidents)

    story.play()

    num_unexplained = sum(item.check() for item in items)
    # What fails while a document decodes alone is that document's error.
    assert num_unexplained <= story.num_accidents
    wait_until(no_engine_thread)
    assert not engine._open
    assert engine._lanes == []
