"""The engine for encoders when things fail, end early, or come from many threads."""

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.encoding.engine import EncodingEngine
from longformer_core.encoding.request import Encoding, EncodingRequest
from longformer_core.errors import (
    CancelledError,
    ConfigError,
    DeadlineError,
    LongformerError,
    NonFiniteError,
    OutOfMemoryError,
    ShapeError,
    TooLongError,
)
from longformer_core.models.led_heads import LEDForSequenceClassification
from longformer_core.models.longformer import (
    LongformerForMaskedLM,
    LongformerForQuestionAnswering,
    LongformerModel,
)
from longformer_core.scheduling.handle import Tokens
from longformer_core.scheduling.scheduler import Load
from tests.helpers import TINY
from tests.longformer_core.encoding.helpers import (
    PATIENCE_S,
    SMALL,
    VOCAB,
    Watched,
    classifier,
    documents,
    hold_at,
    logits,
)

TEXTS = documents(7, *(3 + 11 * i % 67 for i in range(24)))


def alone(text: list[int]) -> torch.Tensor:
    return logits(EncodingEngine(classifier()).add(text).result(PATIENCE_S))


def check(outcome: Encoding, text: list[int]) -> None:
    torch.testing.assert_close(logits(outcome), alone(text), atol=1e-5, rtol=1e-5)


class TestRun:
    def test_long_ones_first_and_packs_within_the_budget(self) -> None:
        model = Watched(classifier())
        engine = EncodingEngine(model, batch_tokens=70)
        requests = [EncodingRequest(text) for text in [*TEXTS, *documents(1, 100)]]
        outcomes = dict(engine.run(requests))
        sizes = [len(text) for pack in model.packs for text in pack]
        assert sizes == sorted(sizes, reverse=True)
        assert [len(text) for text in model.packs[0]] == [100]
        assert all(sum(map(len, pack)) <= 70 for pack in model.packs[1:])
        assert len(model.packs) < len(requests)
        for i, text in enumerate(TEXTS):
            check(outcomes[i], text)

    def test_progress_and_its_errors_reach_the_caller(self) -> None:
        model = Watched(classifier())
        engine = EncodingEngine(model, batch_tokens=70)
        requests = [EncodingRequest(text) for text in TEXTS]
        calls: list[int] = []
        list(engine.run(requests, lambda: calls.append(len(model.packs))))
        assert len(calls) == len(model.packs) > 3

        def stop() -> None:
            raise RuntimeError("the job was cancelled")

        with pytest.raises(RuntimeError, match="cancelled"):
            list(engine.run(requests, stop))

    def test_many_threads_at_once(self) -> None:
        engine = EncodingEngine(classifier(), batch_tokens=150)
        found: dict[int, dict[int, Encoding]] = {}

        def work(number: int) -> None:
            requests = [EncodingRequest(TEXTS[(number + i) % 24]) for i in range(10)]
            if number % 2:
                found[number] = dict(engine.run(requests))
            else:
                handles = [engine.submit(request) for request in requests]
                found[number] = {i: h.result(PATIENCE_S) for i, h in enumerate(handles)}

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        for number, outcomes in found.items():
            for i in range(10):
                check(outcomes[i], TEXTS[(number + i) % 24])
        assert len(found) == 6
        assert list(engine.run([])) == []

    def test_results_keep_nothing_of_their_pack(self) -> None:
        engine = EncodingEngine(classifier())
        requests = [EncodingRequest(text, want=["states", "mean"]) for text in TEXTS[:6]]
        for _, outcome in engine.run(requests):
            for values in (outcome.logits, outcome.states, outcome.mean):
                assert values is not None
                assert values.untyped_storage().nbytes() == values.nbytes


class TestErrors:
    def test_what_is_wrong_with_a_request_is_its_own_error(self) -> None:
        engine = EncodingEngine(classifier())
        good = TEXTS[3]
        bad: list[tuple[type[LongformerError], EncodingRequest]] = [
            (ShapeError, EncodingRequest([])),
            (ShapeError, EncodingRequest([0, VOCAB, 2])),
            (ShapeError, EncodingRequest([0, -1, 2])),
            (ShapeError, EncodingRequest([0, 0.5, 2])),  # type: ignore[list-item]
            (TooLongError, EncodingRequest([5] * 129)),
            (ShapeError, EncodingRequest(good, [len(good)])),
            (ShapeError, EncodingRequest(good, valid=[True])),
            (ShapeError, EncodingRequest(good, token_type_ids=[0])),
            (ShapeError, EncodingRequest(good, token_type_ids=[2] * len(good))),
            (ShapeError, EncodingRequest(good, spans=[(2, 2)])),
            (ShapeError, EncodingRequest(good, spans=[(0, len(good) + 1)])),
            (ShapeError, EncodingRequest(good, want=["mean"], mean_positions=[len(good)])),
            (ShapeError, EncodingRequest(good, want=["mean"], mean_positions=[])),
            (ConfigError, EncodingRequest(good, want=["pooler"])),
            (ConfigError, EncodingRequest(good, want=["average"])),  # type: ignore[list-item]
            (ConfigError, EncodingRequest(good, logit_positions=[1])),
        ]
        requests = [*(request for _, request in bad), EncodingRequest(good)]
        outcomes = dict(engine.run(requests))
        assert [type(outcomes[i].error) for i in range(len(bad))] == [kind for kind, _ in bad]
        check(outcomes[len(bad)], good)

    def test_what_only_some_models_have(self) -> None:
        config = LongformerConfig(**SMALL)
        text = TEXTS[3]
        nothing = EncodingEngine(LongformerModel(config).eval()).add(text).result(PATIENCE_S)
        assert isinstance(nothing.error, ConfigError)
        assert "nothing is asked of a LongformerModel; set want, spans" in str(nothing.error)
        masked = EncodingEngine(LongformerForMaskedLM(config).eval())
        for positions in ([], [len(text)]):
            error = masked.add(text, logit_positions=positions).result(PATIENCE_S).error
            assert isinstance(error, ShapeError if positions else ConfigError)
        asking = EncodingEngine(LongformerForQuestionAnswering(config).eval())
        assert "no separator" in str(asking.add([0, 5, 6]).result(PATIENCE_S).error)
        sizes = TINY | {"vocab_size": VOCAB, "max_decoder_position_embeddings": 40}
        led = EncodingEngine(LEDForSequenceClassification(LEDConfig(**sizes)).eval())
        assert "no end token" in str(led.add([0, 5, 6]).result(PATIENCE_S).error)
        assert "has 40 positions" in str(led.add([5] * 41).result(PATIENCE_S).error)
        error = led.add([0, 5, 2], token_type_ids=[0, 0, 0]).result(PATIENCE_S).error
        assert isinstance(error, ConfigError)

    def test_an_exception_is_one_documents_alone(self) -> None:
        model = Watched(classifier())
        texts = [[token if token != 4 else 5 for token in text] for text in TEXTS[:9]]
        model.poison[4] = KeyError("bad luck")
        texts[2][1] = texts[6][1] = 4
        outcomes = dict(EncodingEngine(model).run([EncodingRequest(text) for text in texts]))
        for i, text in enumerate(texts):
            if i in (2, 6):
                assert type(outcomes[i].error) is LongformerError
                assert "KeyError" in str(outcomes[i].error)
            else:
                check(outcomes[i], text)

    def test_numbers_that_overflow_fail_their_document_only(self) -> None:
        model = classifier()
        texts = [[token if token != 4 else 5 for token in text] for text in TEXTS[:9]]
        with torch.no_grad():
            model.longformer.embeddings.word_embeddings.weight[4] = float("nan")
        texts[2][1] = texts[6][1] = 4
        outcomes = dict(EncodingEngine(model).run([EncodingRequest(text) for text in texts]))
        for i, text in enumerate(texts):
            if i in (2, 6):
                assert isinstance(outcomes[i].error, NonFiniteError)
                assert outcomes[i].logits is None
            else:
                check(outcomes[i], text)

    def test_running_out_of_memory_splits_until_it_fits(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = Watched(classifier())
        model.max_tokens = 70
        texts = [*TEXTS[:9], *documents(4, 90)]
        outcomes = dict(EncodingEngine(model).run([EncodingRequest(text) for text in texts]))
        assert isinstance(outcomes[9].error, OutOfMemoryError)
        assert isinstance(outcomes[9].error.__cause__, torch.OutOfMemoryError)
        assert "90 tokens" in str(outcomes[9].error)
        assert "smaller batch_tokens" in caplog.text
        for i, text in enumerate(TEXTS[:9]):
            check(outcomes[i], text)

    def test_the_memory_budget_bounds_a_pack(self) -> None:
        probe = EncodingEngine(classifier())
        requests = [EncodingRequest(text) for text in documents(1, *[40] * 9, 120)]
        three = probe._num_bytes(requests[:3])
        model = Watched(classifier())
        engine = EncodingEngine(model, memory_bytes=three)
        outcomes = dict(engine.run(requests))
        assert [outcomes[i].error for i in range(9)] == [None] * 9
        assert max(map(len, model.packs)) == 3
        too_much = EncodingEngine(model, memory_bytes=three // 4).submit(requests[9])
        assert isinstance(too_much.result().error, OutOfMemoryError)
        with pytest.raises(ConfigError, match="memory_bytes is 0"):
            EncodingEngine(model, memory_bytes=0)


class TestOwners:
    def test_one_that_waits_may_be_cancelled_or_late(self) -> None:
        model = Watched(classifier())
        is_there, go_on = hold_at(model, 1)
        engine = EncodingEngine(model, batch_tokens=1)
        first = engine.add(TEXTS[0])
        assert is_there.wait(PATIENCE_S)
        cancelled, late = engine.add(TEXTS[1]), engine.add(TEXTS[2], deadline_s=0.0)
        last = engine.add(TEXTS[3], deadline_s=1000)
        waiting = sum(map(len, TEXTS[1:4]))
        assert engine.load() == Load(3, waiting, 1, len(TEXTS[0]))
        cancelled.cancel()
        go_on.set()
        assert isinstance(cancelled.result(PATIENCE_S).error, CancelledError)
        assert isinstance(late.result(PATIENCE_S).error, DeadlineError)
        check(first.result(PATIENCE_S), TEXTS[0])
        check(last.result(PATIENCE_S), TEXTS[3])
        assert model.packs == [[TEXTS[0]], [TEXTS[3]]]
        assert engine.load() == Load(0, 0, 0, 0)

    def test_the_only_event_is_the_outcome(self) -> None:
        heard: list[Tokens | Encoding] = []
        handle = EncodingEngine(classifier()).add(TEXTS[0], on_event=heard.append)
        outcome = handle.result(PATIENCE_S)
        assert list(handle.events(PATIENCE_S)) == [outcome]
        assert heard == [outcome]

    def test_a_listener_that_raises_costs_no_other_document(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(outcome: Encoding) -> None:
            raise KeyError("the listener is gone")

        engine = EncodingEngine(classifier())
        first = engine.submit(EncodingRequest(TEXTS[0]), on_end=fail)
        second = engine.submit(EncodingRequest(TEXTS[1]))
        check(first.result(PATIENCE_S), TEXTS[0])
        check(second.result(PATIENCE_S), TEXTS[1])
        assert "it is not called again" in caplog.text

    def test_leaving_a_run_early_cancels_the_rest(self) -> None:
        model = Watched(classifier())
        engine = EncodingEngine(model, batch_tokens=1)
        run = engine.run([EncodingRequest(text) for text in TEXTS])
        next(run)
        run.close()  # type: ignore[attr-defined]
        check(engine.add(TEXTS[0]).result(PATIENCE_S), TEXTS[0])
        assert len(model.packs) < len(TEXTS)

    def test_a_broken_engine_tells_everybody_and_works_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Broken(BaseException):
            """What nothing guards against."""

        def broken(*_: Any) -> None:
            raise Broken("a bug")

        model = Watched(classifier())
        is_there, go_on = hold_at(model, 1)
        engine = EncodingEngine(model, batch_tokens=1)
        handles = [engine.add(text) for text in TEXTS[:4]]
        assert is_there.wait(PATIENCE_S)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_finish", broken)
            go_on.set()
            errors = [str(handle.result(PATIENCE_S).error) for handle in handles]
        assert all("Broken: a bug" in error for error in errors)
        check(engine.add(TEXTS[0]).result(PATIENCE_S), TEXTS[0])

    def test_a_program_may_end_while_documents_wait(self) -> None:
        program = """
import torch
from longformer_core import EncodingEngine, EncodingRequest, LongformerConfig, LongformerModel
from tests.longformer_core.encoding.helpers import SMALL
torch.set_num_threads(1)
model = LongformerModel(LongformerConfig(**SMALL | {"max_position_embeddings": 5000})).eval()
engine = EncodingEngine(model, batch_tokens=1)
handles = [engine.add([5] * 4000, want=["mean"]) for _ in range(200)]
handles[0].result()
print("leaving", handles[-1].is_done)
"""
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "leaving False\n", "")
