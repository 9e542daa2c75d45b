"""The searches on their own, over a tiny language whose next token depends on the last alone."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from longformer_core.errors import ConfigError
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.search.base import Search, ends_in_stop_string
from longformer_core.generation.search.beam import BeamSearch
from longformer_core.generation.search.factory import start_search

VOCAB, END, START = 6, 2, 3
CPU = torch.device("cpu")


def language(seed: int) -> Tensor:
    """Logits [V, V]: row = last token."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def begin(num_documents: int, **options: Any) -> Search:
    config = GenerationConfig(decoder_start_token_id=START, **options)
    texts = [torch.tensor([0, END])] * num_documents
    return start_search([config] * num_documents, texts, list(range(num_documents)), CPU)


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
    {"do_sample": True, "num_beams": 2, "encoder_repetition_penalty": 1.5},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_documents_at_different_lengths_share_a_step(options: dict[str, Any]) -> None:
    """One document three tokens ahead of another: both get what they get alone."""
    table = language(1)
    options = {"min_length": 6, "max_new_tokens": 9, "output_scores": True, **options}
    alone = run(begin(2, **options), table)
    ahead, behind = (begin(2, **options) for _ in range(2))
    ahead.keep(torch.tensor([0]))
    behind.keep(torch.tensor([1]))
    for _ in range(3):
        step = ahead.advance(table[ahead.inputs()[0]])
        assert step.is_finished == [False]
    ahead.extend(behind)
    assert ahead.lengths.tolist() == [4, 1]
    assert [len(steps) for steps in ahead.step_scores] == [3, 0]
    assert run(ahead, table) == alone


def test_documents_with_sources_of_other_lengths_join() -> None:
    """A ban of what the source holds, wherever the source's row is padded."""
    table = language(4)
    options = {"max_new_tokens": 5, "encoder_no_repeat_ngram_size": 1, "min_length": 6}
    config = GenerationConfig(decoder_start_token_id=START, **options)
    sources = [torch.tensor([4]), torch.tensor([1, 3, 5]), torch.tensor([0, 2])]
    alone = [run(start_search([config], [s], [None], CPU), table)[0] for s in sources]
    search = start_search([config], sources[:1], [None], CPU)
    for source in sources[1:]:
        search.extend(start_search([config], [source], [None], CPU))
    assert run(search, table) == alone
    assert len({tuple(sequences[0]) for sequences, _ in alone}) > 1


@pytest.mark.parametrize("options", OPTIONS)
def test_documents_with_other_lengths_share_a_search(options: dict[str, Any]) -> None:
    """Together from the beginning, or joined: each is as long as its own options say."""
    table = language(1)
    table[:, END] -= 1.0
    wishes = [{"max_new_tokens": 9}, {"max_length": 4}, {"max_new_tokens": 6, "min_length": 6}]
    base = {name: value for name, value in options.items() if name != "min_length"}
    configs = [GenerationConfig(decoder_start_token_id=START, **base, **wish) for wish in wishes]
    text = torch.tensor([0, END])
    alone = [run(start_search([config], [text], [1], CPU), table)[0] for config in configs]
    together = start_search(configs, [text] * 3, [1] * 3, CPU)
    assert run(together, table) == alone
    joined = start_search(configs[1:2], [text], [1], CPU)
    joined.extend(start_search(configs[:1], [text], [1], CPU))
    joined.extend(start_search(configs[2:], [text], [1], CPU))
    assert run(joined, table) == [alone[1], alone[0], alone[2]]
    assert len({len(sequences[0]) for sequences, _ in alone}) > 1


@pytest.mark.parametrize("options", OPTIONS)
def test_keep_takes_documents_out_unchanged(options: dict[str, Any]) -> None:
    table = language(1)
    alone = run(begin(4, max_new_tokens=9, **options), table)
    search = begin(4, max_new_tokens=9, **options)
    search.advance(table[search.inputs()[0]])
    search.keep(torch.tensor([1, 3]))
    assert run(search, table) == [alone[1], alone[3]]


AGREEING: list[dict[str, Any]] = [
    *OPTIONS,
    {"num_beams": 4, "early_stopping": "never", "length_penalty": -1.0},
    {"num_beams": 2, "length_penalty": 3.0, "eos_token_id": [2, 4]},
]


@pytest.mark.parametrize("options", AGREEING)
def test_what_was_agreed_stays(options: dict[str, Any]) -> None:
    """Step by step, each agreed prefix begins the next one and, in the end, the best sequence."""
    early = 0
    for seed in range(20):
        # Without some certainty beams agree on nothing before the end.
        table = language(seed) * 2
        search = begin(1, max_new_tokens=12, **options)
        agreed: list[list[int]] = [search.agreed(0)]
        is_finished = False
        while not is_finished:
            is_finished = search.advance(table[search.inputs()[0]]).is_finished[0]
            agreed.append(search.agreed(0))
        best = search.result(0)[0][0]
        for before, after in itertools.pairwise([*agreed, best]):
            assert after[: len(before)] == before
        early += len(agreed[-2]) > 0
    assert agreed[0] == []
    assert early


def test_greedy_agrees_on_all_it_has_written() -> None:
    search = begin(1, max_new_tokens=5, min_length=6)
    for length in range(1, 6):
        search.advance(language(0)[search.inputs()[0]])
        assert len(search.agreed(0)) == length
    assert search.agreed(0) == search.result(0)[0][0]


def test_draws_are_those_of_torch() -> None:
    """One generator per document, used as torch.multinomial uses it, in whatever company."""
    search = begin(3, max_new_tokens=5, do_sample=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    shares = torch.rand(3, 4, 50).softmax(-1)
    for num_draws in (1, 1, 7, 1):
        expected = [
            torch.multinomial(rows, num_draws, generator=generator)
            for rows, generator in zip(shares, generators, strict=True)
        ]
        assert torch.equal(search._draw(shares, num_draws), torch.stack(expected))


def test_a_stop_string_ends_the_row_in_whose_last_token_it_ends() -> None:
    """Tokens are letters; several letters, and half of a two-byte one, are tokens, too."""
    texts = [b"a", b"b", b"", b"abc", b"\xc3", b"\xa9"]

    def text_of(ids: Sequence[int]) -> str:
        return b"".join(texts[token] for token in ids).decode(errors="replace")

    def ends(tokens: list[int], *stops: str) -> bool:
        options = GenerationConfig(stop_strings=stops, text_of=text_of)
        return ends_in_stop_string(tokens, options)

    assert ends([0, 1], "ab")
    assert ends([1, 1, 0, 1], "x", "bab")
    assert ends([0, 3], "ab")
    assert ends([0, 3], "aa")
    assert not ends([0, 1, 0], "ab")
    assert not ends([3, 1], "abc")
    assert ends([3, 1], "cb")
    assert ends([0, 4, 5], "a\u00e9")
    assert not ends([0, 4], "a\u00e9")
    assert not ends([], "a")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_texts_end_in_a_stop_string(options: dict[str, Any]) -> None:
    def text_of(ids: Sequence[int]) -> str:
        return "".join("abcdef"[token] for token in ids)

    table = language(8)
    table[:, END] = -9.0
    options = {"max_new_tokens": 30, "stop_strings": ("dd", "ba"), "text_of": text_of, **options}
    for sequences, _ in run(begin(4, **options), table):
        text = text_of(sequences[0])
        assert text.endswith(("dd", "ba"))
        assert "dd" not in text[:-1]
        assert "ba" not in text[:-1]


def test_scores_are_kept_when_they_are_asked_for() -> None:
    search = begin(2, max_new_tokens=4, num_beams=3, min_length=6)
    search.advance(language(0)[search.inputs()[0]])
    for read in (search.scores_of, search.beam_indices_of):  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match="output_scores"):
            read(0)


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
