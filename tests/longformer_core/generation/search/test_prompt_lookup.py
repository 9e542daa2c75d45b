"""Guessing tokens from the source: the text of greedy decoding in fewer steps."""

import random
from typing import Any

import pytest
import torch

from longformer_core.errors import ConfigError
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.search.factory import start_search
from longformer_core.generation.search.prompt_lookup import LookupSearch
from tests.longformer_core.generation.helpers import (
    VOCAB,
    Document,
    decode,
    documents,
    models,
    published,
)

RULES: list[dict[str, Any]] = [
    {},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 8, "repetition_penalty": 1.4},
    {"encoder_no_repeat_ngram_size": 2, "forced_bos_token_id": 0},
    {"suppress_tokens": list(range(30, 50)), "forced_eos_token_id": 2},
    {"bad_words_ids": [[token, token] for token in range(4, VOCAB)]},
    {"eos_token_id": [2, *range(4, 20)]},
    {"prefix_allowed_tokens_fn": lambda _, ids: range(len(ids) % 3, VOCAB)},
    {"stop_strings": ("7", "19 5"), "text_of": lambda ids: " ".join(map(str, ids))},
]


def told(seed: int, texts: list[Document], options: dict[str, Any]) -> list[Document]:
    """Put pieces of what greedy decoding says about a text into it, so that guesses are right."""
    ours, _ = models(seed)
    pick = random.Random(seed)
    said = [outcome.sequences[0] for outcome in decode(ours, texts, options)]
    return [
        [*text[:3], *answer[: pick.randint(2, 8)], 5, *answer[-6:], *text[3:]]
        for text, answer in zip(texts, said, strict=True)
    ]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("num_guesses", [1, 4, 30])
def test_the_text_is_that_of_greedy_decoding(rules: dict[str, Any], num_guesses: int) -> None:
    options = {"max_new_tokens": 20, **rules}
    guessed = options | {"prompt_lookup_num_tokens": num_guesses}
    for seed in (1, 3, 10):
        texts = told(seed, documents(seed, 12, 33, 50, 20, 1), options)
        ours, _ = models(seed)
        plain, quick = (decode(ours, texts, o) for o in (options, guessed))
        assert [o.sequences for o in quick] == [o.sequences for o in plain]
        for mine, expected in zip(quick, plain, strict=True):
            assert mine.scores == pytest.approx(expected.scores, abs=1e-4)


def test_it_is_the_published_text() -> None:
    for seed in (1, 3, 10):
        texts = documents(seed, 12, 33, 50, 20)
        ours, theirs = models(seed)
        quick = decode(ours, texts, {"max_new_tokens": 20, "prompt_lookup_num_tokens": 5})
        expected, _ = published(theirs, texts, {"max_new_tokens": 20})
        assert [o.sequences for o in quick] == expected


def test_scores_of_every_kept_token_are_recorded() -> None:
    ours, _ = models(3)
    texts = told(3, documents(3, 30, 40), {"max_new_tokens": 20})
    options = {"max_new_tokens": 20, "output_scores": True}
    plain = decode(ours, texts, options)
    quick = decode(ours, texts, options | {"prompt_lookup_num_tokens": 4})
    for mine, expected in zip(quick, plain, strict=True):
        torch.testing.assert_close(mine.step_scores, expected.step_scores, atol=1e-4, rtol=1e-4)


def copier(text: Document, steps: list[int]) -> list[Document]:
    """Search with a model that copies `text`, then ends; note the steps that it took."""
    options = GenerationConfig(max_new_tokens=40, prompt_lookup_num_tokens=4)
    search = start_search([options], [torch.tensor(text)], [None], torch.device("cpu"))
    assert isinstance(search, LookupSearch)
    following = dict(zip([2, *text], [*text, 2], strict=True))
    while True:
        tokens, _ = search.inputs()
        logits = torch.zeros(len(tokens), VOCAB)
        for row, token in enumerate(tokens.tolist()):
            logits[row, following.get(token, 3)] = 5.0
        steps.append(len(tokens))
        if search.advance(logits).is_finished == [True]:
            return search.result(0)[0]


def test_right_guesses_save_steps() -> None:
    text = list(range(10, 30))
    steps: list[int] = []
    assert copier(text, steps) == [[*text, 2]]
    # One step before the first token of the source is written, then five tokens a step.
    assert len(steps) == 1 + -(-20 // 5)
    assert set(steps) == {5}


@pytest.mark.parametrize(
    "wrong", [{"num_beams": 2}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_it_is_for_greedy_decoding_only(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="greedy decoding of one sequence"):
        decode(models(0)[0], documents(0, 10), {"prompt_lookup_num_tokens": 3, **wrong})
