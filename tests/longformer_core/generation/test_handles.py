"""What one document's owner can do meanwhile: listen, cancel, set a deadline."""

import asyncio
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from longformer_core.errors import CancelledError, DeadlineError, ShapeError
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine
from longformer_core.generation.request import Generation, GenerationHandle
from longformer_core.scheduling.handle import Tokens
from longformer_core.scheduling.scheduler import Load
from tests.longformer_core.generation.helpers import models, wait_until, watch
from tests.longformer_core.generation.scenes import (
    GREEDY,
    LONG,
    LONG_BEAMS,
    MIXED,
    PATIENCE_S,
    TEXTS,
    Listener,
    alone_text,
    at_step,
    hold_at,
    listen_from_now,
    raiser,
    texts_of,
)


def on_a_thread(action: Callable[[], Any]) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join(PATIENCE_S)


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


def early_tokens(handle: GenerationHandle) -> list[int]:
    """Return what can be had of a document without waiting."""
    ids: list[int] = []
    try:
        for event in handle.events(timeout_s=0):
            assert isinstance(event, Tokens)
            ids += event.ids
    except TimeoutError:
        return ids
    raise AssertionError("the document is done")


class TestCallbacks:
    @pytest.mark.parametrize("options", [LONG, LONG_BEAMS])
    def test_events_are_called_as_they_come_by_the_engines_thread(
        self, options: GenerationConfig
    ) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 36)
        heard: list[Tokens | Generation] = []
        threads: set[str] = set()

        def hear(event: Tokens | Generation) -> None:
            threads.add(threading.current_thread().name)
            heard.append(event)

        engine = Engine(model)
        handles = [engine.add(text, options, on_event=hear) for text in TEXTS[:1]]
        handles += [engine.add(text, options) for text in TEXTS[1:3]]
        assert is_there.wait(PATIENCE_S)
        early = list(heard)
        go_on.set()

        sequences = texts_of(handles)[0]

        assert early
        assert all(isinstance(event, Tokens) for event in early)
        *tokens, last = heard
        assert last is handles[0].result()
        assert [t for event in tokens if isinstance(event, Tokens) for t in event.ids] == (
            sequences[0]
        )
        assert threads == {"longhaul-engine"}

    def test_the_error_of_a_request_is_an_event(self) -> None:
        heard: list[Tokens | Generation] = []
        handle = Engine(models(3)[0]).add([], GREEDY, on_event=heard.append)
        assert heard == [handle.result()]
        assert isinstance(handle.result().error, ShapeError)

    def test_a_callback_that_fails_harms_no_document(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        heard: list[Any] = []

        def fail(event: Any) -> None:
            heard.append(event)
            raise KeyError("the listener is gone")

        handle = Engine(models(3)[0]).add(TEXTS[0], GREEDY, on_event=fail)
        assert texts_of([handle]) == [alone_text(0)]
        assert len(heard) == 1
        assert "it is not called again" in caplog.text

    def test_an_event_loop_hears_of_everything(self) -> None:
        """Nothing private is needed to serve from asyncio."""

        async def listen() -> list[Any]:
            loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Any]()
            Engine(models(3)[0]).add(
                TEXTS[0],
                GREEDY,
                on_event=lambda event: loop.call_soon_threadsafe(inbox.put_nowait, event),
            )
            heard = [await asyncio.wait_for(inbox.get(), PATIENCE_S)]
            while not isinstance(heard[-1], Generation):
                heard.append(await asyncio.wait_for(inbox.get(), PATIENCE_S))
            return heard

        *tokens, last = asyncio.run(listen())
        assert last.error is None
        assert [[t for event in tokens for t in event.ids]] == alone_text(0)


class TestLoad:
    def test_what_waits_and_what_runs(self) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 2)
        engine = Engine(model, max_rows=2)
        assert engine.load() == Load(0, 0, 0, 0)
        first = engine.add(TEXTS[0], LONG)
        assert is_there.wait(PATIENCE_S)
        others = [engine.add(text, LONG) for text in TEXTS[1:4]]
        waiting = sum(map(len, TEXTS[1:4]))
        assert engine.load() == Load(3, waiting, 1, len(TEXTS[0]))
        go_on.set()
        texts_of([first, *others])
        assert engine.load() == Load(0, 0, 0, 0)


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


def pass_deadline(handle: GenerationHandle) -> None:
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
