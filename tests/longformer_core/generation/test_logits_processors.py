"""The score rules against the published library's own processors, in its own order."""

import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.logits_processors import History, LogitsProcessors
from longformer_core.generation.logits_warpers import sampling_scores
from tests.longformer_core.generation.helpers import published_scores

VOCAB = 40


def every_third(_batch_id: int, ids: Tensor) -> list[int]:
    """Allow what depends on the row, and nothing that ends a text at some lengths."""
    return [token for token in range(VOCAB) if (token + int(ids.sum())) % 3]


RULES: dict[str, Any] = {
    "sequence_bias": [[[3], 1.5], [[4], -2.0], [[7, 8], 1.0], [[9, 8], 0.5], [[4, 5, 8], -0.7]],
    "encoder_repetition_penalty": 1.7,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[3], [2], [7, 8], [4, 5, 6], [9, 8], [5, 4, 3, 6]],
    "min_length": 6,
    "min_new_tokens": 4,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": [2, 11],
    "suppress_tokens": [12, 13],
    "begin_suppress_tokens": [2, 14],
    "exponential_decay_length_penalty": [1, 1.3],
    "prefix_allowed_tokens_fn": every_third,
    "renormalize_logits": True,
}
LENGTHS = {"max_length": 12, "eos_token_id": [2, 11], "decoder_start_token_id": 2}


@pytest.fixture(scope="module")
def oracle() -> transformers.LEDForConditionalGeneration:
    return transformers.LEDForConditionalGeneration(
        transformers.LEDConfig(
            vocab_size=VOCAB, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
            decoder_ffn_dim=8, encoder_attention_heads=1, decoder_attention_heads=1,
            attention_window=4, max_encoder_position_embeddings=16,
            max_decoder_position_embeddings=16,
        )
    )  # fmt: skip


def few_tokens(seed: int, *shape: int) -> Tensor:
    """Tokens from a small alphabet, so that n-grams and bad words do recur."""
    return torch.randint(3, 10, shape, generator=torch.Generator().manual_seed(seed))


def case(seed: int, num_documents: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = few_tokens(seed, num_documents, num_rows, 12)
    tokens[..., 0] = 2
    sources = few_tokens(seed + 1, num_documents, 9)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_documents, num_rows, VOCAB, generator=generator) * 3
    return tokens, sources, scores


def apply(
    options: dict[str, Any], tokens: Tensor, lengths: Tensor, sources: Tensor, scores: Tensor
) -> Tensor:
    config = GenerationConfig(**options)
    rules = LogitsProcessors(config, torch.device("cpu"))
    source_lengths = torch.full((len(sources),), sources.shape[1])
    limits = (config.shortest_length, config.total_length)
    return rules(scores, History(tokens, lengths, sources, source_lengths, *limits))


def random_rules(seed: int) -> dict[str, Any]:
    pick = random.Random(seed)
    names = pick.sample(sorted(RULES), pick.randint(1, len(RULES)))
    sizes = {name: pick.randint(1, 4) for name in names if name.endswith("ngram_size")}
    return {**LENGTHS, **{name: RULES[name] for name in names}, **sizes}


@pytest.mark.parametrize("seed", range(60))
def test_any_rules_together_give_the_published_scores(
    oracle: transformers.LEDForConditionalGeneration, seed: int
) -> None:
    options = random_rules(seed)
    tokens, sources, scores = case(seed, num_documents=3, num_rows=2)
    before = scores.clone()
    for length in (1, 2, 3, 6, 11):
        ours = apply(options, tokens, torch.full((3,), length), sources, scores)
        theirs = published_scores(
            oracle, options, sources, tokens[..., :length].flatten(0, 1), scores.flatten(0, 1)
        )
        assert torch.equal(ours.flatten(0, 1), theirs), (options, length)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_changes_scores_here(
    oracle: transformers.LEDForConditionalGeneration, name: str
) -> None:
    """Shows that the comparison above would notice a rule that is missing."""
    changed = 0
    for seed in range(10):
        tokens, sources, scores = case(seed, num_documents=3, num_rows=2)
        for length in (1, 2, 6, 11):
            rows = tokens[..., :length].flatten(0, 1)
            theirs = published_scores(
                oracle, {**LENGTHS, name: RULES[name]}, sources, rows, scores.flatten(0, 1)
            )
            changed += not torch.equal(theirs, scores.flatten(0, 1))
    assert changed


@pytest.mark.parametrize("seed", range(10))
def test_documents_of_different_lengths_do_not_meet(seed: int) -> None:
    """Each document alone, unpadded, gives what it gives among longer and shorter ones."""
    options = {**LENGTHS, **RULES}
    tokens, sources, scores = case(seed, num_documents=4, num_rows=2)
    lengths, source_lengths = torch.tensor([1, 2, 7, 11]), torch.tensor([9, 1, 2, 5])
    config = GenerationConfig(**options)
    limits = (config.shortest_length, config.total_length)
    rules = LogitsProcessors(config, torch.device("cpu"))
    together = rules(scores, History(tokens, lengths, sources, source_lengths, *limits))
    for i in range(4):
        own_tokens, own_source = (
            tokens[i : i + 1, :, : lengths[i]],
            sources[i : i + 1, : source_lengths[i]],
        )
        own = (lengths[i : i + 1], own_source, source_lengths[i : i + 1])
        history = History(own_tokens, *own, *limits)
        assert torch.equal(together[i : i + 1], rules(scores[i : i + 1], history))


def test_without_rules_the_scores_are_handed_through() -> None:
    tokens, sources, scores = case(0, num_documents=2, num_rows=1)
    assert apply(LENGTHS, tokens, torch.tensor([3, 3]), sources, scores) is scores


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 0, "top_p": 0.0},
        {"temperature": 2.5, "top_k": 12, "top_p": 0.6},
        {"top_k": 1000},
    ],
)
def test_the_sampled_distribution_is_the_published_one(
    oracle: transformers.LEDForConditionalGeneration, options: dict[str, Any]
) -> None:
    tokens, sources, scores = case(1, num_documents=8, num_rows=1)
    scores[:, :, 5] = scores[:, :, 6]
    options = {**LENGTHS, "do_sample": True, **options}
    theirs = published_scores(oracle, options, sources, tokens[:, 0], scores[:, 0]).softmax(-1)
    ours = sampling_scores(scores, GenerationConfig(**options)).softmax(-1)[:, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    if options.get("top_k") != 1000:
        assert not torch.allclose(theirs, scores[:, 0].softmax(-1), atol=1e-3)
