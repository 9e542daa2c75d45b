"""The engine against the published library's `generate`, token by token, and when things fail."""

import copy
import gc
import random
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longformer_core.errors import (
    ConfigError,
    LongformerError,
    NonFiniteError,
    OutOfMemoryError,
    ShapeError,
    TooLongError,
)
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine
from longformer_core.generation.request import Request
from longformer_core.layout import Layout
from tests.longformer_core.generation.helpers import (
    VOCAB,
    Document,
    decode,
    documents,
    models,
    published,
    wait_until,
    watch,
)

# Models whose texts are of many lengths.
LIVELY = (1, 3, 10)
GREEDY: dict[str, Any] = {"max_new_tokens": 16}
BEAMS: dict[str, Any] = {"max_length": 17, "num_beams": 4}


def agree(seed: int, texts: list[Document], options: dict[str, Any]) -> list[list[Document]]:
    """Decode with both libraries, compare tokens and scores, and return the sequences."""
    ours, theirs = models(seed)
    outcomes = decode(ours, texts, options)
    sequences, scores = published(theirs, texts, options)
    assert [outcome.error for outcome in outcomes] == [None] * len(texts)
    assert [outcome.sequences for outcome in outcomes] == sequences, options
    for outcome, expected in zip(outcomes, scores, strict=False):
        assert outcome.scores == pytest.approx(expected, abs=1e-4, rel=1e-4)
    return sequences


@pytest.mark.parametrize("options", [GREEDY, BEAMS])
def test_the_output_depends_on_the_source(options: dict[str, Any]) -> None:
    for seed in LIVELY:
        texts = documents(seed, *[30] * 6)
        assert len({tuple(rows[0]) for rows in agree(seed, texts, options)}) >= 3


def test_global_positions_default_to_the_first_token() -> None:
    ours, _ = models(0)
    engine = Engine(ours, batch_tokens=1000)
    options = GenerationConfig(**BEAMS)
    texts = documents(5, *[40] * 6)

    def run(positions: list[int] | None) -> list[list[Document]]:
        requests = [Request(text, options, positions) for text in texts]
        return [outcome.sequences for _, outcome in sorted(engine.run(requests), key=_index)]

    assert run(None) == run([0])
    assert run(None) != run([])
    assert run(None) != run([0, 5, 9])


def _index(outcome: tuple[int, Any]) -> int:
    return outcome[0]


MIXED = [
    GREEDY,
    BEAMS,
    BEAMS | {"no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2},
    GREEDY | {"do_sample": True, "top_k": 30, "num_return_sequences": 2},
]


def test_a_document_is_decoded_the_same_alone_and_in_any_company() -> None:
    ours, _ = models(3)
    texts = documents(9, *(3 + 7 * i % 60 for i in range(24)))
    requests = [
        Request(text, GenerationConfig(**MIXED[i % len(MIXED)]), seed=i)
        for i, text in enumerate(texts)
    ]
    engine = Engine(ours, batch_tokens=1)
    alone = [next(iter(engine.run([request])))[1] for request in requests]
    assert all(outcome.error is None for outcome in alone)
    for seed, (batch_tokens, max_rows) in enumerate([(1, 256), (90, 256), (5000, 3), (5000, 256)]):
        order = list(range(len(requests)))
        random.Random(seed).shuffle(order)
        engine = Engine(ours, batch_tokens=batch_tokens, max_rows=max_rows)
        outcomes = dict(engine.run([requests[i] for i in order]))
        for place, i in enumerate(order):
            assert outcomes[place].sequences == alone[i].sequences
            assert outcomes[place].scores == pytest.approx(alone[i].scores, abs=1e-4)


def test_what_is_encoded_and_decoded_together_respects_both_budgets() -> None:
    model = watch(0)
    texts = documents(1, *(5 + 3 * i % 40 for i in range(30)), 100)
    decode(model, texts, {"max_new_tokens": 8}, batch_tokens=80, max_rows=6)
    sizes = [[len(text) for text in pack] for pack in model.encoded]
    assert sizes[0] == [100]
    assert all(sum(pack) <= 80 for pack in sizes[1:])
    assert sum(map(len, sizes)) == 31
    assert max(model.rows) == 6
    model = watch(0)
    decode(model, texts, BEAMS | {"max_length": 3}, batch_tokens=1000, max_rows=10)
    assert set(model.rows) <= {4, 8}


def test_the_place_of_a_finished_document_is_filled_at_once() -> None:
    model = watch(4)
    texts = documents(2, *[25] * 30)
    lengths = [len(outcome.sequences[0]) for outcome in decode(model, texts, GREEDY, max_rows=6)]
    assert min(lengths) < max(lengths)
    assert model.rows[0] == 6
    last_start = max(i for i in range(len(model.rows)) if model.rows[i] == 6)
    assert set(model.rows[: last_start + 1]) == {6}
    assert sum(model.rows) == sum(lengths)


def test_finished_documents_leave_at_once() -> None:
    model = watch(4)
    texts = documents(2, *[25] * 12)
    lengths = [len(outcome.sequences[0]) for outcome in decode(model, texts, GREEDY)]
    assert min(lengths) < max(lengths)
    expected = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert model.rows == expected


def test_progress_is_reported_after_each_encode_and_step() -> None:
    model = watch(0)
    calls: list[tuple[int, int]] = []
    options = GenerationConfig(**GREEDY)
    requests = [Request(text, options) for text in documents(2, 25, 30, 35)]
    engine = Engine(model, batch_tokens=40)
    list(engine.run(requests, lambda: calls.append((len(model.encoded), len(model.rows)))))
    # At least what was done by then: the engine does not wait for whoever is told.
    assert all(sum(call) >= number for number, call in enumerate(calls, start=1))
    assert len(calls) == len(model.encoded) + len(model.rows)
    assert calls == sorted(calls)

    def stop() -> None:
        raise RuntimeError("the job was cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        list(engine.run(requests, stop))


def test_an_exception_is_one_documents_alone() -> None:
    texts = documents(4, *(10 + i for i in range(9)))
    good = decode(models(1)[0], texts, BEAMS)
    texts[2][5] = texts[6][4] = 3
    model = watch(1)
    model.poison[3] = KeyError("bad luck")
    outcomes = decode(model, texts, BEAMS)
    for i, outcome in enumerate(outcomes):
        if i in (2, 6):
            assert outcome.sequences == []
            assert type(outcome.error) is LongformerError
            assert "KeyError" in str(outcome.error)
            assert isinstance(outcome.error.__cause__, KeyError)
        else:
            assert outcome.sequences == good[i].sequences


def test_running_out_of_memory_splits_until_it_fits(caplog: pytest.LogCaptureFixture) -> None:
    texts = documents(4, *(10 + i for i in range(9)), 90)
    good = decode(models(1)[0], texts, BEAMS)
    model = watch(1)
    model.max_tokens, model.max_rows = 60, 8
    outcomes = decode(model, texts, BEAMS)
    assert [o.sequences for o in outcomes[:-1]] == [g.sequences for g in good[:-1]]
    assert isinstance(outcomes[-1].error, OutOfMemoryError)
    assert isinstance(outcomes[-1].error.__cause__, torch.OutOfMemoryError)
    assert "90 tokens" in str(outcomes[-1].error)
    assert "smaller batch_tokens" in caplog.text


def test_the_memory_of_a_failed_pack_is_let_go() -> None:
    """An error keeps its traceback, and the traceback must not keep the tensors."""
    model = watch(0)
    model.max_rows = 1
    sources: list[Any] = []
    make = model._model.source

    class Source:
        def __init__(self, source: Any) -> None:
            self._source = source

        def __getattr__(self, name: str) -> Any:
            return getattr(self._source, name)

    def source(*args: Any, **options: Any) -> Any:
        made = Source(make(*args, **options))
        sources.append(weakref.ref(made))
        return made

    model.source = source
    outcomes = decode(model, documents(0, 30), BEAMS | {"min_length": 10})
    assert isinstance(outcomes[0].error, OutOfMemoryError)
    # The engine's thread may still be on its way out.
    wait_until(lambda: gc.collect() >= 0 and [ref() for ref in sources] == [None])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("options", [GREEDY, BEAMS, GREEDY | {"do_sample": True}])
def test_numbers_that_overflow_fail_their_document_only(
    value: float, options: dict[str, Any]
) -> None:
    texts = documents(4, *(10 + i for i in range(9)))
    for text in texts:
        text[:] = [token if token != 3 else 4 for token in text]
    seeds = list(range(9))
    # The embedding is untied, or a broken row would reach every document through the logits.
    model = copy.deepcopy(models(1)[0])
    encoder = model.led.encoder
    encoder.embed_tokens = copy.deepcopy(encoder.embed_tokens)
    good = decode(model, texts, options, seeds=seeds)
    with torch.no_grad():
        encoder.embed_tokens.weight[3] = value
    texts[2][5] = texts[6][4] = 3
    outcomes = decode(model, texts, options, seeds=seeds)
    for i, outcome in enumerate(outcomes):
        if i in (2, 6):
            assert isinstance(outcome.error, NonFiniteError)
            assert outcome.sequences == []
        else:
            assert outcome.sequences == good[i].sequences


def test_broken_logits_late_in_a_text_are_found() -> None:
    """A decoder position that is NaN fails only the documents whose text gets that far."""
    model = copy.deepcopy(models(1)[0])
    texts = documents(2, *[25] * 12)
    good = decode(model, texts, GREEDY)
    with torch.no_grad():
        model.led.decoder.embed_positions.weight[6] = float("nan")
    outcomes = decode(model, texts, GREEDY)
    failed = [isinstance(outcome.error, NonFiniteError) for outcome in outcomes]
    assert failed == [len(g.sequences[0]) > 6 for g in good]
    assert 0 < sum(failed) < len(texts)
    assert "after 6 tokens" in str(next(o.error for o in outcomes if o.error))


def test_documents_that_cannot_be_encoded_get_their_own_error() -> None:
    ours, _ = models(0)
    texts = [*documents(0, 20, 128, 129), [], [0, VOCAB, 2], [0, -1, 2], documents(1, 30)[0]]
    outcomes = decode(ours, texts, GREEDY)
    errors = [type(outcome.error) for outcome in outcomes]
    none = type(None)
    assert errors == [none, none, TooLongError, ShapeError, ShapeError, ShapeError, none]
    assert "129 tokens" in str(outcomes[2].error)
    request = Request(texts[0], GenerationConfig(**GREEDY), global_positions=[50])
    assert isinstance(dict(Engine(ours, batch_tokens=99).run([request]))[0].error, ShapeError)


def test_wrong_options_are_refused_before_any_work() -> None:
    model = watch(0)
    options = GenerationConfig(max_new_tokens=41)
    with pytest.raises(ConfigError, match="40 positions"):
        Engine(model, batch_tokens=100).run([Request([0, 5, 2], options)])
    for budget in ({"batch_tokens": 0}, {"batch_tokens": 5, "max_rows": 0}):
        with pytest.raises(ConfigError, match="1 or greater"):
            Engine(model, **budget)
    assert model.encoded == []


def test_no_requests_no_outcomes() -> None:
    empty: Iterator[Any] = Engine(models(0)[0], batch_tokens=1).run([])
    assert list(empty) == []


SAMPLE = {"max_new_tokens": 12, "do_sample": True, "top_k": 0}


def test_sampling_repeats_with_the_seed_and_varies_with_it() -> None:
    ours, _ = models(2)
    text = documents(0, 30)[0]
    one = decode(ours, [text] * 6, SAMPLE, seeds=[1, 2, 3, 4, 5, 1])
    assert one[0].sequences == one[5].sequences
    assert len({tuple(o.sequences[0]) for o in one}) >= 4
    fresh = decode(ours, [text] * 6, SAMPLE)
    assert len({tuple(o.sequences[0]) for o in fresh}) >= 4


def test_several_samples_of_one_document() -> None:
    ours, _ = models(2)
    options = SAMPLE | {"num_return_sequences": 5}
    outcome = decode(ours, documents(0, 30), options, seeds=[7])[0]
    assert len(outcome.sequences) == len(outcome.scores) == 5
    assert outcome.scores == sorted(outcome.scores, reverse=True)
    assert len({tuple(s) for s in outcome.sequences}) >= 3


def test_one_allowed_token_makes_sampling_greedy() -> None:
    texts = documents(0, 30, 20, 10)
    for seed in range(3):
        sampled = decode(models(seed)[0], texts, GREEDY | {"do_sample": True, "top_k": 1})
        assert [o.sequences for o in sampled] == agree(seed, texts, GREEDY)


def test_sampled_first_tokens_follow_the_models_distribution() -> None:
    ours, _ = models(4)
    text = documents(3, 30)[0]
    options = {"max_new_tokens": 1, "do_sample": True, "top_k": 6, "num_return_sequences": 4000}
    outcome = decode(ours, [text], options, seeds=[11])[0]
    drawn = torch.tensor(outcome.sequences)[:, 0].bincount(minlength=VOCAB) / 4000
    with torch.inference_mode():
        layout = Layout.from_lengths([len(text)], [(0,)])
        source = ours.source(ours.encode(torch.tensor(text), layout), layout)
        start = torch.tensor([2])
        logits = ours.decode_step(start, torch.zeros(1).long(), ours.new_cache(1), source)
    best = logits[0].topk(6)
    expected = torch.zeros(VOCAB).scatter(0, best.indices, best.values.softmax(0))
    # Four standard deviations of a share of 1/2 among 4000 draws.
    torch.testing.assert_close(drawn, expected, atol=0.032, rtol=0)
