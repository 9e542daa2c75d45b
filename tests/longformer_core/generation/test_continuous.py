"""Documents that come and go while others decode: each one's text is its own alone."""

import copy
import functools
import random
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longformer_core.attention.rows import Form
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
    outcome = give(Engine(fragile()), request_of(text, option)).result(PATIENCE_S)
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
        for event in self.handle.events(PATIENCE_S):
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
        outcome = self.handle.result(PATIENCE_S)
        if self.listener is not None:
            self.listener.join(PATIENCE_S)
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
        # The engine decodes a document before `add` has returned its handle.
        self._acting = threading.Lock()
        self.num_accidents = 0
        self.plans: list[int] = []
        model.before_step.append(self._before_step)

    def play(self) -> None:
        while self._due:
            with self._acting:
                if self._due:
                    self._due.popleft()[1]()
            self._wait()

    def _wait(self) -> None:
        for item in self._items:
            if hasattr(item, "handle"):
                item.handle.result(PATIENCE_S)

    def _before_step(self) -> None:
        self.plans.append(planned(self._engine))
        step = len(self._model.rows)
        with self._acting:
            while self._due and self._due[0][0] <= step:
                self._due.popleft()[1]()
        if step in self._accidents:
            self.num_accidents += 1
            raise self._accidents[step]


def planned(engine: Engine) -> int:
    """What the engine reckons that those that decode take."""
    return engine._plan.held_bytes([handle for lane in engine._lanes for handle in lane.handles])


def random_item(pick: random.Random, options: list[int]) -> Item:
    fates = ["cancel", "late", "in a hurry", "nan", "poison"]
    return Item(
        text=pick.randrange(NUM_TEXTS),
        option=pick.choice(options),
        fate=pick.choice(fates) if pick.random() < 0.3 else "good",
        come=pick.randrange(12),
        cancel=pick.randrange(12),
        listen=pick.choice([None, None, 0, 3, 50]),
    )


def random_accidents(pick: random.Random) -> dict[int, Exception]:
    errors = [RuntimeError("odd"), MemoryError("full"), torch.OutOfMemoryError("full")]
    return {pick.randint(1, 40): pick.choice(errors) for _ in range(pick.choice([0, 0, 1, 2]))}


# A number, of which the story is made: drawn piece by piece, most would repeat one another.
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**9))
def test_whatever_happens_to_others_a_documents_text_is_its_own(seed: int) -> None:
    pick = random.Random(seed)
    # Few kinds of options, so that some documents share theirs and some only the step.
    rows = pick.choice([[0, 4, 7], [2, 3, 6], [1, 5], range(len(MIXED))])
    options = pick.sample(rows, k=min(len(rows), 3))
    items = [random_item(pick, options) for _ in range(pick.randint(3, 16))]
    model = Watched(fragile())
    model.poison[POISON_TOKEN] = KeyError("bad luck")
    model.max_rows = pick.choice([10**9, 10**9, 8, 4])
    form: Form = pick.choice(["auto", "absorbed", "projected"])
    probe = Engine(fragile(), memory_bytes=2**40, form=form)
    largest = max(probe._plan.num_bytes([Handle(item.request)]) for item in items)
    batch_tokens = pick.choice([10_000, 10_000, 60, 1])
    engine = Engine(
        model,
        batch_tokens=batch_tokens,
        max_rows=pick.choice([256, 256, 256, 6, 1]),
        memory_bytes=int(largest * pick.choice([1000.0, 1000.0, 2.5, 1.0])),
        form=form,
    )
    story = Story(model, engine, items, random_accidents(pick))

    story.play()

    num_unexplained = sum(item.check() for item in items)
    # What fails while a document decodes alone is that document's error.
    assert num_unexplained <= story.num_accidents
    assert max(story.plans, default=0) <= engine._plan.memory_bytes
    assert all(len(pack) == 1 or sum(map(len, pack)) <= batch_tokens for pack in model.encoded)
    wait_until(no_engine_thread)
    assert engine._open == set()
    assert engine._lanes == []


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


def on_a_thread(action: Callable[[], Any]) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join(PATIENCE_S)


def listen_from_now(handle: Handle) -> None:
    with pytest.raises(TimeoutError, match="no token for 0 s"):
        next(handle.events(timeout_s=0))


def texts_of(handles: list[Handle]) -> list[list[list[int]]]:
    outcomes = [handle.result(PATIENCE_S) for handle in handles]
    assert [outcome.error for outcome in outcomes] == [None] * len(handles)
    return [outcome.sequences for outcome in outcomes]


class TestStreams:
    def test_the_first_tokens_come_before_the_last(self) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 10)
        handle = Engine(model).add(TEXTS[2], LONG)
        events = handle.events(PATIENCE_S)
        listen_from_now(handle)
        assert is_there.wait(PATIENCE_S)

        first = next(events)

        assert isinstance(first, Tokens)
        assert not handle.is_done
        go_on.set()
        *others, last = events
        assert isinstance(last, Generation)
        assert last is handle.result()
        assert [t for event in (first, *others) for t in event.ids] == last.sequences[0]

    def test_some_tokens_of_beams_are_certain_before_the_last(self) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 36)
        engine = Engine(model)
        handles = [engine.add(text, LONG_BEAMS) for text in TEXTS[:8]]
        for handle in handles:
            listen_from_now(handle)
        assert is_there.wait(PATIENCE_S)

        early = [early_tokens(handle) for handle in handles]

        assert not any(handle.is_done for handle in handles)
        assert sum(map(bool, early)) >= 4
        go_on.set()
        for handle, ids, sequences in zip(handles, early, texts_of(handles), strict=True):
            rest = [t for e in handle.events(PATIENCE_S) if isinstance(e, Tokens) for t in e.ids]
            assert ids + rest == sequences[0]

    @pytest.mark.parametrize("options", MIXED)
    def test_who_asks_when_it_is_done_gets_all_at_once(self, options: GenerationConfig) -> None:
        handle = Engine(models(3)[0]).add(TEXTS[4], options)
        outcome = handle.result(PATIENCE_S)
        assert list(handle.events()) == [Tokens(outcome.sequences[0]), outcome]
        assert list(handle.events()) == [outcome]

    @pytest.mark.parametrize("options", MIXED)
    def test_a_document_that_is_begun_again_repeats_nothing(
        self, options: GenerationConfig
    ) -> None:
        """Also one that samples without a seed: it is given one."""
        model = watch(3)
        is_there, go_on = hold_at(model, 1)
        at_step(model, 3, raiser(RuntimeError("odd")))
        engine = Engine(model)
        handles = [engine.add(TEXTS[8], options)]
        assert is_there.wait(PATIENCE_S)
        handles.append(engine.add(TEXTS[9], options))
        listeners = [Listener(handle) for handle in handles]
        wait_until(lambda: all(handle.is_streamed for handle in handles))
        go_on.set()

        for listener, sequences in zip(listeners, texts_of(handles), strict=True):
            listener.join(PATIENCE_S)
            assert listener.ids == sequences[0]
        assert model.encoded == [[TEXTS[8]], [TEXTS[9]]] * 2

    def test_an_error_comes_after_the_tokens(self) -> None:
        model = watch(3)
        handle = Engine(model).add(TEXTS[2], LONG)
        at_step(model, 10, handle.cancel)
        *tokens, last = handle.events(PATIENCE_S)
        assert isinstance(last, Generation)
        assert isinstance(last.error, CancelledError)
        told = [t for event in tokens for t in event.ids]
        assert (
            told
            == Engine(models(3)[0]).add(TEXTS[2], LONG).result(PATIENCE_S).sequences[0][: len(told)]
        )


def early_tokens(handle: Handle) -> list[int]:
    """Return what can be had of a document without waiting."""
    ids: list[int] = []
    try:
        for event in handle.events(timeout_s=0):
            assert isinstance(event, Tokens)
            ids += event.ids
    except TimeoutError:
        return ids
    raise AssertionError("the document is done")


class TestCancelling:
    def test_one_that_waits_is_never_encoded(self) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 2)
        engine = Engine(model, max_rows=1)
        first, second, third = (engine.add(text, LONG) for text in TEXTS[:3])
        assert is_there.wait(PATIENCE_S)
        second.cancel()
        go_on.set()
        assert isinstance(second.result(PATIENCE_S).error, CancelledError)
        assert not first.is_done
        texts_of([first, third])
        assert model.encoded == [[TEXTS[0]], [TEXTS[2]]]

    def test_one_that_decodes_frees_its_place_at_the_next_step(self) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 1)
        engine = Engine(model, max_rows=2)
        handles = [engine.add(TEXTS[0], LONG)]
        assert is_there.wait(PATIENCE_S)
        handles += [engine.add(text, LONG) for text in TEXTS[1:3]]
        at_step(model, 7, lambda: on_a_thread(handles[0].cancel))
        go_on.set()

        assert isinstance(handles[0].result(PATIENCE_S).error, CancelledError)

        texts = texts_of(handles[1:])
        assert texts == texts_of([Engine(models(3)[0]).add(text, LONG) for text in TEXTS[1:3]])
        # One alone, both, and the third in the first one's place until the second ends.
        assert model.rows == [1] + [2] * 38 + [1] * 6

    def test_what_is_done_stays_done(self) -> None:
        handle = Engine(models(3)[0]).add(TEXTS[0], GREEDY)
        outcome = handle.result(PATIENCE_S)
        handle.cancel()
        assert handle.result() is outcome
        assert outcome.error is None

    def test_all_of_them_and_the_next_one_is_decoded(self) -> None:
        model = watch(3)
        engine = Engine(model)
        handles = [engine.add(text, LONG) for text in TEXTS[:4]]
        at_step(model, 5, lambda: [handle.cancel() for handle in handles])
        for handle in handles:
            assert isinstance(handle.result(PATIENCE_S).error, CancelledError)
        assert texts_of([engine.add(TEXTS[0], MIXED[0])]) == [alone_text(0)]

    @pytest.mark.parametrize("way", ["cancelled", "late"])
    def test_one_that_is_to_be_tried_again_is_not(self, way: str) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 1)
        engine = Engine(model)
        first = engine.add(TEXTS[0], LONG)
        assert is_there.wait(PATIENCE_S)
        second = engine.add(TEXTS[1], LONG, deadline_s=None if way == "cancelled" else 0.3)
        at_step(model, 3, raiser(RuntimeError("odd")))
        # The first one is tried again before the second.
        end_it = second.cancel if way == "cancelled" else functools.partial(pass_deadline, second)
        at_step(model, 5, end_it)
        at_step(model, 8, lambda: seen.append(second.is_done))
        seen: list[bool] = []
        go_on.set()

        error = second.result(PATIENCE_S).error

        assert isinstance(error, CancelledError if way == "cancelled" else DeadlineError)
        texts_of([first])
        assert seen == [True]
        assert model.encoded == [[TEXTS[0]], [TEXTS[1]], [TEXTS[0]]]


def alone_text(text: int) -> list[list[int]]:
    return texts_of([Engine(models(3)[0]).add(TEXTS[text], GREEDY)])[0]


def pass_deadline(handle: Handle) -> None:
    wait_until(lambda: time.monotonic() > (handle.deadline or 0))


class TestTime:
    def test_a_deadline_ends_those_that_wait_and_those_that_decode(self) -> None:
        model = watch(3)
        engine = Engine(model, max_rows=2)
        is_there, go_on = hold_at(model, 1)
        good = engine.add(TEXTS[0], LONG)
        assert is_there.wait(PATIENCE_S)
        decoding = engine.add(TEXTS[1], LONG, deadline_s=0.25)
        waiting = engine.add(TEXTS[2], LONG, deadline_s=0.2)
        next_one = engine.add(TEXTS[3], GREEDY)
        at_step(model, 4, functools.partial(pass_deadline, decoding))
        ends: list[bool] = []
        at_step(model, 5, lambda: ends.extend([decoding.is_done, waiting.is_done, good.is_done]))
        go_on.set()

        texts = texts_of([good, next_one])

        assert ends == [True, True, False]
        assert texts == [
            texts_of([Engine(models(3)[0]).add(TEXTS[0], LONG)])[0],
            alone_text(3),
        ]
        for handle, seconds in ((decoding, "0.25 s"), (waiting, "0.2 s")):
            error = handle.result().error
            assert isinstance(error, DeadlineError)
            assert f"not done after {seconds}" in str(error)
        assert model.encoded == [[TEXTS[0]], [TEXTS[1]], [TEXTS[3]]]

    def test_a_deadline_that_is_kept_changes_nothing(self) -> None:
        engine = Engine(models(3)[0])
        handles = [engine.add(text, GREEDY, deadline_s=1000) for text in TEXTS[:3]]
        assert texts_of(handles) == [alone_text(i) for i in range(3)]

    def test_who_waits_too_long_is_told_and_the_document_goes_on(self) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 2)
        handle = Engine(model).add(TEXTS[0], GREEDY)
        listen_from_now(handle)
        assert is_there.wait(PATIENCE_S)
        with pytest.raises(TimeoutError, match=r"not done after 0\.01 s"):
            handle.result(0.01)
        with pytest.raises(TimeoutError, match=r"no token for 0\.01 s"):
            list(handle.events(0.01))
        go_on.set()
        assert texts_of([handle]) == [alone_text(0)]


class TestThread:
    def test_many_threads_at_once(self) -> None:
        engine = Engine(fragile(), max_rows=24)
        found: dict[int, list[Generation]] = {}

        def work(number: int) -> None:
            requests = [request_of((7 * number + i) % NUM_TEXTS, i % 8) for i in range(10)]
            if number % 2:
                outcomes = dict(engine.run(requests))
                found[number] = [outcomes[i] for i in range(10)]
            else:
                handles = [give(engine, request) for request in requests]
                found[number] = [handle.result(PATIENCE_S) for handle in handles]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)

        for number in range(8):
            for i, outcome in enumerate(found[number]):
                expected = alone((7 * number + i) % NUM_TEXTS, i % 8)
                assert outcome.sequences == expected.sequences
        wait_until(no_engine_thread)
        assert texts_of([give(engine, request_of(0, 0))]) == [alone(0, 0).sequences]
        wait_until(no_engine_thread)

    def test_a_thread_that_ends_misses_nobody(self) -> None:
        """Documents come just when the last one has ended."""
        engine = Engine(models(3)[0])
        one = GenerationConfig(max_new_tokens=1)
        for _ in range(300):
            assert engine.add([0, 5, 2], one).result(10).error is None

    def test_two_runs_are_decoded_together(self) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 1)
        engine = Engine(model)
        runs = [engine.run([Request(text, LONG) for text in TEXTS[i : i + 2]]) for i in (0, 2)]
        outcomes: list[dict[int, Generation]] = [{}, {}]
        threads = [
            threading.Thread(target=lambda i=i: outcomes[i].update(runs[i])) for i in range(2)
        ]
        threads[0].start()
        assert is_there.wait(PATIENCE_S)
        threads[1].start()
        wait_until(lambda: len(engine._open) == 4)
        go_on.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert model.rows[1:] == [4] * 37 + [2]
        for i, found in enumerate(outcomes):
            for j in range(2):
                handle = Engine(models(3)[0]).add(TEXTS[2 * i + j], LONG)
                assert found[j].sequences == texts_of([handle])[0]

    def test_leaving_a_run_early_cancels_the_rest(self) -> None:
        model = watch(3)
        engine = Engine(model, max_rows=2)
        stays = engine.add(TEXTS[0], LONG)
        requests = [Request(TEXTS[1], GREEDY), *(Request(text, LONG) for text in TEXTS[2:8])]
        run = engine.run(requests)
        next(run)
        run.close()
        texts_of([stays])
        wait_until(no_engine_thread)
        assert engine._open == set()
        assert engine._watchers == []
        assert sum(map(len, model.encoded)) < len(requests)

    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (Lane, "extend"),
            (Lane, "step"),
            (Lane, "remove"),
            (Lane, "__init__"),
            (Engine, "_next_pack"),
            (Engine, "_dismiss"),
            (Engine, "_end"),
        ],
    )
    def test_a_broken_engine_tells_everybody_and_works_again(
        self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
    ) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 3)
        engine = Engine(model, max_rows=3)
        handles = [engine.add(text, LONG) for text in TEXTS[:2]]
        assert is_there.wait(PATIENCE_S)
        handles += [engine.add(text, LONG) for text in TEXTS[2:5]]
        handles[1].cancel()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            go_on.set()
            errors = [handle.result(PATIENCE_S).error for handle in handles]
            wait_until(no_engine_thread)
        for error in errors:
            assert type(error) in (LongformerError, CancelledError)
        assert sum("Broken: a bug" in str(error) for error in errors) >= 4
        assert texts_of([engine.add(TEXTS[0], GREEDY)]) == [alone_text(0)]

    @pytest.mark.parametrize("name", ["extend", "remove", "_tell"])
    def test_an_error_between_steps_loses_no_document(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """Out of memory where documents join or leave: all of the lane begin again."""
        model = watch(3)
        is_there, go_on = hold_at(model, 1)
        engine = Engine(model)
        handles = [engine.add(TEXTS[0], GREEDY)]
        assert is_there.wait(PATIENCE_S)
        handles += [engine.add(text, GREEDY) for text in TEXTS[1:4]]
        method, calls = getattr(Lane, name), []

        def once(self: Lane, *args: Any) -> None:
            method(self, *args)
            if (args and args[0]) and not calls:
                calls.append(name)
                raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(Lane, name, once)
        go_on.set()
        assert texts_of(handles) == [alone_text(i) for i in range(4)]
        assert calls == [name]

    def test_a_program_may_end_while_documents_are_decoded(self) -> None:
        """A thread inside torch would abort it."""
        program = """
import torch
from longformer_core import Engine, GenerationConfig, LEDConfig, LEDForConditionalGeneration
from tests.helpers import TINY
torch.set_num_threads(1)
sizes = TINY | {"vocab_size": 120, "max_decoder_position_embeddings": 9000}
model = LEDForConditionalGeneration(LEDConfig(**sizes)).eval()
options = GenerationConfig(max_new_tokens=9000, min_new_tokens=9000)
handle = Engine(model).add([0, 5, 7, 2], options)
next(handle.events())
print("leaving", handle.is_done)
"""
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "leaving False\n", "")

    def test_a_program_that_ends_leaves_nobody_waiting(self) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 3)
        engine = Engine(model, max_rows=2)
        handles = [engine.add(text, LONG) for text in TEXTS[:4]]
        assert is_there.wait(PATIENCE_S)
        stop = threading.Thread(target=engine._stop)
        stop.start()
        wait_until(lambda: engine._is_stopping)
        go_on.set()
        stop.join(PATIENCE_S)
        handles.append(engine.add(TEXTS[0], GREEDY))
        for handle in handles:
            error = handle.result(PATIENCE_S).error
            assert isinstance(error, CancelledError)
            assert "the program end" in str(error)
        assert len(model.rows) == 3
        assert no_engine_thread()


class Broken(BaseException):
    """What nothing guards against."""


def broken(*_: Any) -> None:
    raise Broken("a bug")


class TestMemory:
    def test_what_does_not_fit_alone_is_refused_before_any_work(self) -> None:
        model = watch(3)
        small, large = Request(TEXTS[0], GREEDY), Request(TEXTS[5], BEAMS)
        needed = Engine(model)._plan.num_bytes([Handle(large)])
        engine = Engine(model, memory_bytes=needed - 1)
        outcomes = dict(engine.run([small, large]))
        assert outcomes[0].error is None
        error = outcomes[1].error
        assert isinstance(error, OutOfMemoryError)
        assert f"needs about {needed / 1e9:.3g} GB" in str(error)
        assert f"of {(needed - 1) / 1e9:.3g} GB" in str(error)
        assert model.encoded == [[TEXTS[0]]]
        assert dict(Engine(model, memory_bytes=needed).run([large]))[0].error is None

    def test_documents_wait_until_there_is_memory(self) -> None:
        model = watch(3)
        texts = documents(1, *[40] * 10)
        probe = Engine(model)
        three = probe._plan.num_bytes([Handle(Request(text, LONG)) for text in texts[:3]])
        engine = Engine(model, memory_bytes=three)
        plans: list[int] = []
        model.before_step.append(lambda: plans.append(planned(engine)))

        outcomes = dict(engine.run([Request(text, LONG) for text in texts]))

        assert all(outcome.error is None for outcome in outcomes.values())
        # Three can be encoded at once; a few more are held in the room that this took.
        assert 3 <= max(model.rows) <= 5
        assert max(plans) <= three
        assert sum(model.rows) == 10 * 38

    def test_the_plan_covers_what_is_held(self) -> None:
        """Up to the room that is kept for documents to come: a factor of two."""
        model = watch(3)
        engine = Engine(model)
        shares: list[float] = []

        def compare() -> None:
            shares.append(sum(map(held_bytes, engine._lanes)) / planned(engine))

        model.before_step.append(compare)
        options = [GenerationConfig(max_new_tokens=4), LONG, LONG_BEAMS, BEAMS]
        requests = [
            Request(text, options[i % 4]) for i, text in enumerate(documents(1, *[90, 5, 40] * 10))
        ]
        assert all(outcome.error is None for _, outcome in engine.run(requests))
        assert 0.2 < max(shares) < 2

    def test_no_room_to_encode_beside_others_disturbs_nobody(self) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 3)
        engine = Engine(model)
        first = engine.add(TEXTS[0], LONG)
        assert is_there.wait(PATIENCE_S)
        model.max_tokens = 100
        others = documents(5, *[40] * 4)
        handles = [engine.add(text, GREEDY) for text in others]
        go_on.set()
        texts = texts_of([first, *handles])
        assert sum(pack.count(TEXTS[0]) for pack in model.encoded) == 1
        assert [len(pack) for pack in model.encoded] == [1, 4, 2, 2]
        assert texts[0] == texts_of([Engine(models(3)[0]).add(TEXTS[0], LONG)])[0]
        model = watch(3)
        assert texts[1:] == [texts_of([Engine(model).add(text, GREEDY)])[0] for text in others]

    def test_those_that_are_tried_again_keep_to_the_budget(self) -> None:
        """They came in packs of one, and their lane of four fails."""
        model = watch(3)
        at_step(model, 8, raiser(RuntimeError("odd")))
        texts = documents(5, *[40] * 4)
        outcomes = dict(Engine(model, batch_tokens=45).run([Request(text, LONG) for text in texts]))
        assert all(outcome.error is None for outcome in outcomes.values())
        assert [len(pack) for pack in model.encoded] == [1] * 8

    def test_one_that_lacks_memory_beside_others_is_tried_alone(self) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 3)
        engine = Engine(model)
        first = engine.add(TEXTS[0], LONG)
        assert is_there.wait(PATIENCE_S)
        model.max_tokens = 10
        second = engine.add(TEXTS[5], GREEDY)
        at_step(model, 20, lambda: setattr(model, "max_tokens", 1000))
        go_on.set()
        assert texts_of([second]) == [alone_text(5)]
        assert first.is_done
        assert len(model.encoded) == 3


def held_bytes(lane: Lane) -> int:
    """What sources and cache of a lane really take."""
    tensors = [tensor for group in lane._source._groups for tensor in group.held.tensors]
    return sum(t.untyped_storage().nbytes() for t in tensors) + lane._cache.num_bytes


class TestOptions:
    def test_documents_of_different_options_step_together(self) -> None:
        model = Watched(fragile())
        is_there, go_on = hold_at(model, 1)
        engine = Engine(model)
        chosen, starts = [(3, 0), (5, 7), (9, 4), (10, 0)], [1, 2, 2, 4]
        handles = [give(engine, request_of(*chosen[0]))]
        assert is_there.wait(PATIENCE_S)
        handles += [give(engine, request_of(*pair)) for pair in chosen[1:3]]
        at_step(model, 3, lambda: handles.append(give(engine, request_of(*chosen[3]))))
        go_on.set()

        texts = [texts_of([handle])[0] for handle in handles]

        assert texts == [alone(*pair).sequences for pair in chosen]
        ends = [start + len(rows[0]) for start, rows in zip(starts, texts, strict=True)]
        assert model.rows == [
            sum(start <= step < end for start, end in zip(starts, ends, strict=True))
            for step in range(1, max(ends))
        ]
        assert model.rows[3] == 4

    def test_equally_many_rows_step_together_and_others_in_turn(self) -> None:
        """Two beams beside two samples, and four beams in a step of their own."""
        model = Watched(fragile())
        is_there, go_on = hold_at(model, 1)
        engine = Engine(model)
        chosen = [(0, 2), (5, 3), (9, 6), (10, 1), (11, 5)]
        handles = [give(engine, request_of(*chosen[0]))]
        assert is_there.wait(PATIENCE_S)
        handles += [give(engine, request_of(*pair)) for pair in chosen[1:]]
        go_on.set()
        assert texts_of(handles) == [alone(*pair).sequences for pair in chosen]
        # A pack has equally many rows: the four beams are admitted one step later.
        assert model.rows[:4] == [2, 6, 6, 8]

    def test_ids_that_are_none_are_an_error_of_their_document(self) -> None:
        engine = Engine(models(3)[0])
        bad: list[Any] = [["a", "b"], [0, None, 2], [0.5, 2.0], [[0, 5, 2]]]
        requests = [Request(ids, GREEDY) for ids in (*bad, TEXTS[0])]
        outcomes = dict(engine.run(requests))
        assert [type(outcomes[i].error) for i in range(4)] == [ShapeError] * 4
        assert outcomes[4].sequences == alone_text(0)
