"""Decoding against the published library's `generate`: every option, token by token.

Two correct programs may differ where two candidates score the same up to rounding. Such a
difference is looked into here, step by step, and anything else fails.
"""

import copy
import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from longformer_core.generation import running_batch
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.logits_processors import History, LogitsProcessors
from longformer_core.generation.search.base import Search
from longformer_core.generation.search.beam import BeamSearch
from longformer_core.generation.search.factory import start_search
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.tokenization.tokenizer import LEDTokenizer
from tests.helpers import trained_tokenizer_directory
from tests.longformer_core.generation.helpers import (
    VOCAB,
    Document,
    decode,
    documents,
    models,
    published,
    published_scores,
)

CPU = torch.device("cpu")
BAD_WORDS = [[token] for token in range(4, 60)] + [[60, 61], [62, 62], [2]]
Models = tuple[LEDForConditionalGeneration, transformers.LEDForConditionalGeneration]


THIRDS = [[2, *(t for t in range(4, VOCAB) if t % 3 != third)] for third in range(3)]


def some_allowed(_batch_id: int, ids: Tensor) -> list[int]:
    """Allow two thirds of the vocabulary, which two depends on the last token; and the end."""
    return THIRDS[int(ids[-1]) % 3]


@dataclasses.dataclass(frozen=True)
class Case:
    """A ragged batch for one model under one set of options."""

    model: int
    texts: list[Document]
    positions: list[list[int]]
    options: dict[str, Any]

    @property
    def models(self) -> Models:
        """Every other model has heads that the kernels for few rows on CPUs read."""
        return models(self.model, d_model=128) if self.model % 2 else models(self.model)

    def ours(self) -> list[list[Document]]:
        outcomes = decode(self.models[0], self.texts, self.options, positions=self.positions)
        assert [outcome.error for outcome in outcomes] == [None] * len(self.texts)
        return [outcome.sequences for outcome in outcomes]

    def theirs(self, **arguments: Any) -> list[list[Document]]:
        _, model = self.models
        rows, _ = published(model, self.texts, self.options, positions=self.positions, **arguments)
        return rows


def random_case(seed: int) -> Case:
    pick = random.Random(seed)
    options = random_options(pick)
    lengths = [pick.randint(2, 100) for _ in range(3)]
    if any(name.startswith("encoder_") for name in options):
        # The published library counts padding as source text here, so there is none.
        lengths = lengths[:1] * 3
    patterns = [[0], [0], [], [0, 1], pick.sample(range(min(lengths)), k=min(3, *lengths))]
    return Case(
        model=seed % 12,
        texts=documents(seed, *lengths),
        positions=[sorted(pick.choice(patterns)) for _ in lengths],
        options=options,
    )


def random_options(pick: random.Random) -> dict[str, Any]:
    """Options of which each is on in some; mostly such that texts get long."""
    options: dict[str, Any] = {"num_beams": pick.choice([1, 1, 2, 3, 4, 6])}
    options[pick.choice(["max_length", "max_new_tokens"])] = pick.randint(18, 25)
    if pick.random() < 0.92:
        options[pick.choice(["min_length", "min_new_tokens"])] = 17
    if options["num_beams"] > 1:
        options["early_stopping"] = pick.choice([True, False, "never"])
        options["length_penalty"] = pick.choice([0.0, 0.5, 1.0, 2.0, -1.0])
        options["num_return_sequences"] = pick.randint(1, options["num_beams"])
    maybe: dict[str, Any] = {
        "no_repeat_ngram_size": pick.randint(1, 4),
        "encoder_no_repeat_ngram_size": pick.randint(1, 3),
        "repetition_penalty": pick.choice([0.7, 1.3, 2.0]),
        "encoder_repetition_penalty": pick.choice([0.7, 1.5]),
        "bad_words_ids": BAD_WORDS,
        "suppress_tokens": pick.sample(range(4, VOCAB), 40),
        "begin_suppress_tokens": [2, *pick.sample(range(4, VOCAB), 40)],
        "forced_bos_token_id": 0,
        "forced_eos_token_id": pick.choice([2, [2, 7]]),
        "eos_token_id": [2, *pick.sample(range(4, VOCAB), 12)],
        "exponential_decay_length_penalty": (pick.randint(0, 18), pick.choice([1.05, 1.3])),
        "sequence_bias": [
            [[token, other][: pick.randint(1, 2)], pick.uniform(-3, 3)]
            for token, other in itertools.product(range(4, VOCAB, 9), repeat=2)
        ],
        "renormalize_logits": True,
    }
    return options | {name: value for name, value in maybe.items() if pick.random() < 0.2}


def explains(case: Case, document: int) -> bool:
    """Return whether the libraries part, for this document, over candidates that score the same.

    At the first step at which the running rows are not the same, the rows that only one library
    has are compared; if there is no such step, the first sequences that are not the same.
    """
    for ours, theirs in zip(*traces(case, document), strict=False):
        if ours != theirs:
            scores = [score_of(case, document, row) for row in sorted(ours ^ theirs)]
            break
    else:
        penalty = case.options.get("length_penalty", 1.0)
        pairs = zip(case.ours()[document], case.theirs()[document], strict=True)
        rows = next(pair for pair in pairs if pair[0] != pair[1])
        scores = [score_of(case, document, row) / len(row) ** penalty for row in rows]
    return max(scores) - min(scores) <= 4 * float(np.spacing(np.float32(max(map(abs, scores)))))


def score_of(case: Case, document: int, row: Sequence[int]) -> float:
    """Return what a candidate was compared by, computed with our model in one pass.

    A beam's is the sum of its log-probabilities after the rules, in float32; a greedy row, which
    is never compared with rows of another past, has the last token's logit after the rules.
    """
    model, _ = case.models
    options = GenerationConfig(**case.options)
    rules = LogitsProcessors(options, CPU)
    text = torch.tensor([case.texts[document]])
    tokens = torch.tensor([[options.decoder_start_token_id, *row]])
    is_global = torch.zeros_like(text)
    is_global[0, case.positions[document]] = 1
    with torch.inference_mode():
        logits = model(
            text, decoder_input_ids=tokens[:, :-1], global_attention_mask=is_global
        ).logits
    scores = logits if options.num_beams == 1 else logits.log_softmax(-1)
    gains = []
    for length, token in enumerate(row, start=1):
        history = history_of(options, tokens[None], length, text)
        gains.append(rules(scores[:, length - 1 : length], history)[0, 0, token])
    return float(gains[-1] if options.num_beams == 1 else sum(gains))


def history_of(options: GenerationConfig, tokens: Tensor, length: int, sources: Tensor) -> History:
    """Describe one document of which `length` tokens are written."""
    source_lengths = torch.tensor([sources.shape[1]])
    limits = (options.shortest_length, options.total_length)
    return History(tokens, torch.tensor([length]), sources, source_lengths, *limits)


Trace = list[set[tuple[int, ...]]]


def traces(case: Case, document: int) -> tuple[Trace, Trace]:
    """Return the rows that run in ours and in theirs, step by step, start token left out."""
    place, num_rows = case.texts[document], case.options["num_beams"]
    ours: Trace = []

    class Recorded(BeamSearch):
        """A search that notes the rows of one document, found by its source, at every step."""

        def advance(self, logits: Tensor) -> Any:
            step = super().advance(logits)
            for slot, source in enumerate(self.sources):
                if source == place:
                    rows = self.tokens[slot, :, 1 : int(self.lengths[slot])].tolist()
                    ours.append(set(map(tuple, rows)))
            return step

        def keep(self, staying: Tensor) -> None:
            super().keep(staying)
            self.sources = [self.sources[slot] for slot in staying.tolist()]

        def extend(self, other: Any) -> None:
            super().extend(other)
            self.sources = self.sources + other.sources

    theirs: Trace = []

    def record(input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = input_ids[document * num_rows : (document + 1) * num_rows, 1:].tolist()
        theirs.append(set(map(tuple, rows)))
        return scores

    def start(options: Any, sources: Any, seeds: Any, device: Any) -> Search:
        search = Recorded(options, sources, seeds, device)
        search.sources = [source.tolist() for source in sources]
        return search

    if num_rows > 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running_batch, "start_search", start)
            case.ours()
        case.theirs(logits_processor=transformers.LogitsProcessorList([record]))
        return ours, theirs[1:]
    both = [rows[document][0] for rows in (case.ours(), case.theirs())]
    return tuple([{tuple(row[:n])} for n in range(1, len(row) + 1)] for row in both)  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("num_cases", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_random_cases_give_the_published_tokens(num_cases: int) -> None:
    num_identical, lengths, unexplained = 0, [], []
    for seed in range(num_cases):
        case = random_case(seed)
        ours, theirs = case.ours(), case.theirs()
        num_identical += ours == theirs
        lengths += [len(rows[0]) for rows in theirs]
        for document, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if mine != other and not explains(case, document):
                unexplained.append((seed, document, case.options))
    assert unexplained == []
    assert num_identical >= 0.99 * num_cases
    assert sum(length >= 16 for length in lengths) >= 0.9 * len(lengths)


@dataclasses.dataclass(frozen=True)
class Altered(Case):
    """A case of which the other library makes something else."""

    other_name: int = 50
    other_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def theirs(self, **arguments: Any) -> list[list[Document]]:
        if self.other_options:
            options = self.options | self.other_options
            return Case(self.model, self.texts, self.positions, options).theirs(**arguments)
        name = {50: self.other_name}
        return [[[name.get(t, t) for t in row] for row in rows] for rows in self.ours()]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_only_equal_scores_explain_a_difference(num_beams: int) -> None:
    texts, options = documents(0, 20, 30, 40), {"max_new_tokens": 6, "num_beams": num_beams}
    case = Altered(98, texts, [[0]] * 3, options)
    # A tie: tokens 50 and 51 are one row of the model's tied embedding, and likely.
    for model in case.models:
        with torch.no_grad():
            model.get_input_embeddings().weight[51] = model.get_input_embeddings().weight[50]
            model.final_logits_bias[0, 50:52] = 6.0
    for other_name in (51, 52):
        renamed = dataclasses.replace(case, other_name=other_name)
        parted = [a != b for a, b in zip(renamed.ours(), renamed.theirs(), strict=True)]
        assert any(parted)
        explained = [explains(renamed, i) for i, is_parted in enumerate(parted) if is_parted]
        assert all(explained) == any(explained) == (other_name == 51)
    assert not explains(dataclasses.replace(case, other_options={"suppress_tokens": [50, 51]}), 0)


GREEDY: dict[str, Any] = {"max_new_tokens": 16}
BEAMS: dict[str, Any] = {"max_length": 17, "num_beams": 4}
LONG_BEAMS = BEAMS | {"length_penalty": 2.0}
# Models whose texts are of many lengths.
LIVELY = (1, 3, 4, 10)
BIASES = [[[token], -3.0 if token % 2 else 2.0] for token in range(4, 60)] + [
    [[token, token + 1], 4.0] for token in range(4, VOCAB - 1)
]
# What an option is added to, and the option.
ONE_OPTION: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"max_length": 9}),
    ({}, {"max_new_tokens": 7}),
    (GREEDY, {"min_length": 14}),
    (GREEDY, {"min_new_tokens": 12}),
    (GREEDY, {"num_beams": 4}),
    (BEAMS, {"num_return_sequences": 3}),
    (BEAMS, {"length_penalty": 3.0}),
    (BEAMS, {"length_penalty": -2.0}),
    (LONG_BEAMS, {"early_stopping": True}),
    (LONG_BEAMS | {"early_stopping": True}, {"early_stopping": False}),
    (LONG_BEAMS | {"max_length": 30}, {"early_stopping": "never"}),
    (GREEDY, {"repetition_penalty": 1.5}),
    (BEAMS, {"repetition_penalty": 1.5}),
    (GREEDY, {"encoder_repetition_penalty": 3.0}),
    (GREEDY, {"no_repeat_ngram_size": 2}),
    (BEAMS, {"no_repeat_ngram_size": 2}),
    (GREEDY, {"encoder_no_repeat_ngram_size": 1}),
    (GREEDY, {"bad_words_ids": BAD_WORDS}),
    (GREEDY, {"suppress_tokens": list(range(4, 60))}),
    (GREEDY, {"begin_suppress_tokens": [2, *range(4, 60)]}),
    (GREEDY, {"forced_bos_token_id": 0}),
    (BEAMS, {"forced_eos_token_id": 2}),
    (GREEDY, {"eos_token_id": [2, *range(4, 20)]}),
    (GREEDY, {"decoder_start_token_id": 0}),
    (GREEDY, {"exponential_decay_length_penalty": (3, 1.5)}),
    (BEAMS, {"sequence_bias": BIASES}),
    (BEAMS | {"no_repeat_ngram_size": 1}, {"renormalize_logits": True}),
    (GREEDY, {"prefix_allowed_tokens_fn": some_allowed}),
    (BEAMS, {"prefix_allowed_tokens_fn": some_allowed}),
]


@functools.cache
def without(seed: int, base: str) -> list[list[Document]]:
    """The published library's output before an option is added; `base` is the options' repr."""
    options = next(options for options, _ in ONE_OPTION if repr(options) == base)
    return published(models(seed)[1], option_texts(seed), options)[0]


def option_texts(seed: int) -> list[Document]:
    return documents(seed, *[30] * 10)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize(("base", "option"), ONE_OPTION, ids=lambda options: " ".join(options))
def test_each_option_gives_the_published_tokens_and_is_seen(
    base: dict[str, Any], option: dict[str, Any]
) -> None:
    """Only texts that the published library writes otherwise without the option are counted."""
    num_seen = 0
    for seed in LIVELY:
        ours, theirs = models(seed)
        expected, scores = published(theirs, option_texts(seed), base | option)
        outcomes = decode(ours, option_texts(seed), base | option)
        assert [outcome.sequences for outcome in outcomes] == expected
        for outcome, score in zip(outcomes, scores, strict=False):
            assert outcome.scores == pytest.approx(score, abs=1e-4, rel=1e-4)
        num_seen += sum(a != b for a, b in zip(expected, without(seed, repr(base)), strict=True))
    assert num_seen >= 10


@pytest.mark.parametrize("num_beams", [1, 3])
def test_stop_strings_give_the_published_tokens_and_are_seen(num_beams: int) -> None:
    """Stop strings from the texts themselves; many begin and end within tokens."""
    folder = trained_tokenizer_directory()
    tokenizer = transformers.LEDTokenizer.from_pretrained(folder)
    text_of = LEDTokenizer.from_pretrained(folder).decode
    base, texts = {"max_new_tokens": 12, "num_beams": num_beams}, documents(2, *[30] * 6)
    num_seen = 0
    # Models whose texts hold many different tokens.
    for seed in (0, 1, 3, 11):
        ours, theirs = models(seed, vocab_size=1200)
        free, _ = published(theirs, texts, base)
        stops = {middle(text_of(rows[0])) for rows in free} - {""}
        options = base | {"stop_strings": sorted(stops)}
        for text, without_stops in zip(texts, free, strict=True):
            [expected], _ = published(theirs, [text], options, tokenizer=tokenizer)
            assert decode(ours, [text], options | {"text_of": text_of})[0].sequences == expected
            num_seen += expected != without_stops
    assert num_seen >= 10


def middle(text: str) -> str:
    """Return four characters from the middle of the longest run of whole characters."""
    longest = max(text.split("\ufffd"), key=len)
    start = max(0, len(longest) // 2 - 2)
    return longest[start : start + 4]


FILTERS: dict[str, Any] = {
    "temperature": 0.6,
    "top_k": 7,
    "top_p": 0.7,
    "min_p": 0.2,
    "typical_p": 0.6,
    "epsilon_cutoff": 0.02,
    "eta_cutoff": 0.1,
}


def random_filters(seed: int) -> dict[str, Any]:
    pick = random.Random(seed)
    names = pick.sample(sorted(FILTERS), pick.randint(2, len(FILTERS)))
    return {"top_k": 0, **{name: FILTERS[name] for name in names}}


SAMPLING = [{"top_k": 0, name: value} for name, value in FILTERS.items()]
SAMPLING += [random_filters(seed) for seed in range(9)]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("filters", SAMPLING, ids=lambda options: " ".join(options))
def test_the_sampled_distribution_is_the_published_one(
    filters: dict[str, Any], num_beams: int
) -> None:
    """At every step of a text, from the scores of our model."""
    options = {"max_new_tokens": 10, "do_sample": True, "num_beams": num_beams, **filters}
    config, num_changed = GenerationConfig(**options), 0
    for seed in (1, 2, 3):
        ours, theirs = models(seed)
        texts = documents(seed, 30)
        tokens = torch.tensor([[2, *decode(ours, texts, options, seeds=[seed])[0].sequences[0]]])
        sources = torch.tensor(texts)
        with torch.inference_mode():
            scores = ours(sources, decoder_input_ids=tokens).logits.log_softmax(-1)
        for length in range(1, tokens.shape[1]):
            last = scores[:, length - 1]
            history = history_of(config, tokens[None], length, sources)
            mine = LogitsProcessors(config, CPU)(last[None], history)[0].softmax(-1)
            other = published_scores(theirs, options, sources, tokens[:, :length], last)
            torch.testing.assert_close(mine, other.softmax(-1), atol=1e-6, rtol=0)
            num_changed += not torch.allclose(mine, last.softmax(-1), atol=1e-3)
    assert num_changed >= 10


DRAWN: list[dict[str, Any]] = [
    {},
    {"top_k": 0},
    {"num_return_sequences": 3},
    {"num_return_sequences": 2, "repetition_penalty": 1.3, "top_p": 0.9, "min_new_tokens": 8},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2, "top_k": 0, "temperature": 1.5},
    {"num_beams": 2, "typical_p": 0.8, "early_stopping": True, "length_penalty": 2.0},
    {"num_beams": 2, "top_k": 1, "renormalize_logits": True},
]


@pytest.mark.parametrize("options", DRAWN)
def test_a_seed_gives_what_it_gives_the_published_library(options: dict[str, Any]) -> None:
    """Ours are decoded together, theirs one by one after `torch.manual_seed`."""
    options = {"max_new_tokens": 16, "do_sample": True, **options}
    for seed in LIVELY:
        ours, theirs = models(seed)
        texts, seeds = documents(seed, 30, 12, 50), [seed, seed + 1, seed + 2]
        outcomes = decode(ours, texts, options, seeds=seeds)
        for text, start, outcome in zip(texts, seeds, outcomes, strict=True):
            torch.manual_seed(start)
            [expected], _ = published(theirs, [text], options)
            # Without beams, theirs are in the order of the rows, and ours best first.
            assert sorted(outcome.sequences) == sorted(expected)
            if "num_beams" in options:
                assert outcome.sequences == expected


SCORED: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 2},
    {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 0.8},
    {
        "num_beams": 3,
        "num_return_sequences": 2,
        "repetition_penalty": 1.3,
        "forced_bos_token_id": 0,
    },
    {"num_beams": 3, "do_sample": True, "num_return_sequences": 3, "renormalize_logits": True},
]


@pytest.mark.parametrize("options", SCORED)
def test_scores_and_beam_indices_are_the_published_ones(options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 14, "output_scores": True, **options}
    for seed in LIVELY:
        _, theirs = models(seed)
        source = torch.tensor(documents(seed, 30))
        torch.manual_seed(seed)
        with torch.no_grad():
            out = theirs.generate(source, **options, return_dict_in_generate=True)
        search = searched(theirs, source, options, seed)
        sequences, _ = search.result(0)
        scores = search.scores_of(0)
        expected = torch.stack(out.scores)
        if "num_beams" not in options:
            # Theirs are in the order of the rows, and ours best first.
            rows = [[t for t in row if t != 1] for row in out.sequences[:, 1:].tolist()]
            expected = expected[:, [rows.index(sequence) for sequence in sequences]]
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
        if isinstance(search, BeamSearch):
            indices = [[i for i in row if i >= 0] for row in out.beam_indices.tolist()]
            assert search.beam_indices_of(0) == indices


def searched(
    model: transformers.LEDForConditionalGeneration,
    source: Tensor,
    options: dict[str, Any],
    seed: int,
) -> Search:
    """Search to the end over one document, on the published model's logits."""
    search = start_search([GenerationConfig(**options)], [source[0]], [seed], CPU)
    is_finished = False
    while not is_finished:
        rows = search.tokens[0, :, : int(search.lengths[0])]
        with torch.inference_mode():
            logits = model(source.expand(len(rows), -1), decoder_input_ids=rows).logits
        is_finished = search.advance(logits[:, -1]).is_finished[0]
    return search


def test_bfloat16_mostly_gives_the_published_tokens() -> None:
    """Rounding is coarse and ties are many, so this only shows that nothing is out of place.

    Measured over 60 documents of random options: 43 % (CPU, torch 2.13).
    """
    num_equal, num_documents = 0, 0
    for seed in range(20):
        case = random_case(seed)
        ours, theirs = bfloat16_models(case.model)
        outcomes = decode(ours, case.texts, case.options, positions=case.positions)
        expected, _ = published(theirs, case.texts, case.options, positions=case.positions)
        for outcome, rows in zip(outcomes, expected, strict=True):
            num_equal += outcome.sequences[0] == rows[0]
            num_documents += 1
    assert num_equal >= 0.3 * num_documents


@functools.cache
def bfloat16_models(seed: int) -> Models:
    ours, theirs = models(seed)
    return copy.deepcopy(ours).bfloat16(), copy.deepcopy(theirs).bfloat16()
