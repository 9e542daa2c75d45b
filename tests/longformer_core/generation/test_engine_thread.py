"""The engine's thread: many callers, errors of its own, and the end of the program."""

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from longformer_core.errors import CancelledError, LongformerError
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine
from longformer_core.generation.request import Generation, Request
from longformer_core.generation.running_batch import RunningBatch
from longformer_core.scheduling.scheduler import Load
from tests.longformer_core.generation.helpers import models, wait_until, watch
from tests.longformer_core.generation.scenes import (
    GREEDY,
    LONG,
    NUM_TEXTS,
    PATIENCE_S,
    TEXTS,
    alone,
    alone_text,
    fragile,
    give,
    hold_at,
    no_engine_thread,
    request_of,
    texts_of,
)


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
        wait_until(lambda: engine.load().running_documents + engine.load().waiting_documents == 4)
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
        assert engine.load() == Load(0, 0, 0, 0)
        assert engine._watchers == []
        assert sum(map(len, model.encoded)) < len(requests)

    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (RunningBatch, "extend"),
            (RunningBatch, "step"),
            (RunningBatch, "remove"),
            (RunningBatch, "__init__"),
            (Engine, "_next_pack"),
            (Engine, "_expire"),
            (Engine, "_finish"),
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
        """Out of memory where documents join or leave: all of the batch begin again."""
        model = watch(3)
        is_there, go_on = hold_at(model, 1)
        engine = Engine(model)
        handles = [engine.add(TEXTS[0], GREEDY)]
        assert is_there.wait(PATIENCE_S)
        handles += [engine.add(text, GREEDY) for text in TEXTS[1:4]]
        method, calls = getattr(RunningBatch, name), []

        def once(self: RunningBatch, *args: Any) -> None:
            method(self, *args)
            if (args and args[0]) and not calls:
                calls.append(name)
                raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(RunningBatch, name, once)
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
