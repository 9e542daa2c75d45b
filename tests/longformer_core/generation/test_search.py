"""The searches on their own, over a tiny language whose next token depends on the last alone."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.search import BeamSearch, Search, start_search

VOCAB, END, START = 6, 2, 3
CPU = torch.device("cpu")


def language(seed: int) -> Tensor:
    """Logits [V, V]: row = last token."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def begin(num_documents: int, **options: Any) -> Search:
    config = GenerationConfig(decoder_start_token_id=START, **options)
    texts = [torch.tensor([0, END])] * num_documents
    return start_search(config, texts, list(range(num_documents)), CPU)


def run(search: Search, table: Tensor) -> list[tuple[list[list[int]], list[float]]]:
    """Step until every document is finished; each leaves with its result as it does."""
    results: dict[int, tuple[list[list[int]], list[float]]] = {}
    documents = list(range(len(search.tokens)))
    while documents:
        step = search.advance(table[search.inputs()[0]])
        staying = []
        for slot, (document, is_finished) in enumerate(
            zip(documents, step.is_finished, strict=True)
        ):
            if is_finished:
                results[document] = search.result(slot)
            else:
                staying.append(slot)
        documents = [documents[slot] for slot in staying]
        search.keep(torch.tensor(staying, dtype=torch.int64))
    return [results[document] for document in sorted(results)]


def every_text(table: Tensor, max_new_tokens: int, penalty: float) -> list[tuple[float, list[int]]]:
    """Score all texts there are, best first."""
    log_probs = table.log_softmax(-1)
    texts = []
    for length in range(1, max_new_tokens + 1):
        for text in itertools.product(range(VOCAB), repeat=length):
            if END in text[:-1] or (text[-1] != END and length < max_new_tokens):
                continue
            pairs = itertools.pairwise((START, *text))
            total = sum(float(log_probs[a, b]) for a, b in pairs)
            texts.append((total / length**penalty, list(text)))
    return sorted(texts, reverse=True)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_beams_wide_enough_find_the_best_texts_there_are(seed: int, penalty: float) -> None:
    table = language(seed)
    search = begin(
        1, max_new_tokens=4, num_beams=220, num_return_sequences=20, length_penalty=penalty,
        early_stopping="never", eos_token_id=END,
    )  # fmt: skip
    sequences, scores = run(search, table)[0]
    ranked = every_text(table, 4, penalty)
    assert scores == pytest.approx([score for score, _ in ranked[:20]], abs=1e-5)
    # Texts with the same transitions tie, so their order is free; each still has its own score.
    score_of = {tuple(text): score for score, text in ranked}
    assert scores == pytest.approx([score_of[tuple(text)] for text in sequences], abs=1e-5)
    assert len(set(map(tuple, sequences))) == 20


def test_greedy_takes_the_best_token_and_scores_it() -> None:
    table = language(0)
    table[:, END] = -9.0
    sequences, scores = run(begin(1, max_new_tokens=5, length_penalty=2.0), table)[0]
    last, total, expected = START, 0.0, []
    for _ in range(5):
        best = int(table[last].argmax())
        total += float(table[last].log_softmax(-1)[best])
        expected.append(best)
        last = best
    assert sequences == [expected]
    assert scores == pytest.approx([total / 5**2], abs=1e-5)


OPTIONS: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 3, "num_return_sequences": 3},
    {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 2, "min_length": 5},
    {"do_sample": True, "num_return_sequences": 2, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_documents_at_different_lengths_share_a_step(options: dict[str, Any]) -> None:
    """One document three tokens ahead of another: both get what they get alone."""
    table = language(1)
    alone = run(begin(2, max_new_tokens=9, **options), table)
    ahead, behind = (begin(2, max_new_tokens=9, **options) for _ in range(2))
    ahead.keep(torch.tensor([0]))
    behind.keep(torch.tensor([1]))
    for _ in range(3):
        step = ahead.advance(table[ahead.inputs()[0]])
        assert step.is_finished == [False]
    for name in ahead._state:
        setattr(ahead, name, torch.cat([getattr(ahead, name), getattr(behind, name)]))
    assert run(ahead, table) == alone


@pytest.mark.parametrize("options", OPTIONS)
def test_keep_takes_documents_out_unchanged(options: dict[str, Any]) -> None:
    table = language(1)
    alone = run(begin(4, max_new_tokens=9, **options), table)
    search = begin(4, max_new_tokens=9, **options)
    search.advance(table[search.inputs()[0]])
    search.keep(torch.tensor([1, 3]))
    assert run(search, table) == [alone[1], alone[3]]


def test_parents_name_the_rows_that_go_on() -> None:
    """Replaying each row's tokens through its parents gives the row."""
    table = language(5)
    search = begin(2, max_new_tokens=6, num_beams=3)
    assert isinstance(search, BeamSearch)
    rows = search.tokens.flatten(0, 1)
    for _ in range(4):
        step = search.advance(table[search.inputs()[0]])
        assert step.parents is not None
        length = int(search.lengths[0])
        now = search.tokens.flatten(0, 1)
        assert torch.equal(now[:, : length - 1], rows[step.parents][:, : length - 1])
        rows = now


def test_enough_candidates_run_on_when_many_ids_end_a_text() -> None:
    ends = (2, 4, 5)
    table = language(6)
    table[:, ends] += 9.0
    search = begin(1, max_new_tokens=8, num_beams=3, eos_token_id=ends, early_stopping="never")
    for _ in range(4):
        search.advance(table[search.inputs()[0]])
        written = search.tokens[..., 1 : int(search.lengths[0])]
        assert not torch.isin(written, torch.tensor(ends)).any()
        assert (search.scores[:, :2] > -1e8).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_number_that_is_not_finite_fails_its_document(
    options: dict[str, Any], value: float
) -> None:
    search = begin(3, max_new_tokens=5, **options)
    logits = language(2)[search.inputs()[0]]
    logits[search.num_rows * 2 - 1, 4] = value
    assert search.advance(logits).is_failed == [False, True, False]


def test_a_banned_token_is_not_a_failure() -> None:
    """Published models ban tokens by -inf in their bias."""
    for options in OPTIONS:
        search = begin(1, max_new_tokens=5, **options)
        logits = language(2)[search.inputs()[0]]
        logits[:, 0] = -float("inf")
        assert search.advance(logits).is_failed == [False]


def test_sampling_from_nothing_is_a_failure() -> None:
    everything = tuple(range(VOCAB))
    search = begin(1, max_new_tokens=5, do_sample=True, suppress_tokens=everything)
    assert search.advance(language(2)[search.inputs()[0]]).is_failed == [True]


def test_the_first_draws_do_not_depend_on_the_longest_length() -> None:
    table = language(3)
    table[:, END] = -9.0
    short, long = (run(begin(1, max_new_tokens=n, do_sample=True), table)[0] for n in (4, 9))
    assert long[0][0][:4] == short[0][0]
