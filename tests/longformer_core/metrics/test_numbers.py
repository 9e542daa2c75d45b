"""Regression against scipy and scikit-learn; perplexity against its definition."""

import math
import random

import pytest
import torch
from scipy import stats
from sklearn.metrics import mean_squared_error

from longformer_core.errors import NonFiniteError, ShapeError
from longformer_core.metrics import score_perplexity, score_values


def test_values_equal_scipy_and_scikit_learn() -> None:
    rng = random.Random(0)
    references = [float(rng.randint(0, 5)) for _ in range(40)]
    predictions = [value + rng.gauss(0, 1) for value in references]
    scores = score_values(predictions, references)
    assert scores.summary == {
        "mse": pytest.approx(mean_squared_error(references, predictions)),
        "pearson": pytest.approx(stats.pearsonr(predictions, references).statistic),
        "spearman": pytest.approx(stats.spearmanr(predictions, references).statistic),
    }
    assert scores.per_row[3]["mse"] == pytest.approx((predictions[3] - references[3]) ** 2)


def test_correlations_of_a_known_order() -> None:
    scores = score_values([1, 2, 3, 4], [1, 8, 27, 64]).summary
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(0.9513698855)
    assert score_values([3, 2, 1], [1, 2, 3]).summary["pearson"] == pytest.approx(-1)


def test_equal_values_have_no_correlation() -> None:
    for scores in (
        score_values([1, 1], [1, 2]),
        score_values([1, 2], [1, 1]),
        score_values([3], [1]),
    ):
        assert scores.summary["pearson"] == scores.summary["spearman"] == 0.0
    assert scores.summary["mse"] == 4.0


def test_failed_values_are_left_out() -> None:
    scores = score_values([1.0, None, 4.0, 3.0], [1.0, 9.0, 2.0, 3.0])
    assert scores.summary == score_values([1.0, 4.0, 3.0], [1.0, 2.0, 3.0]).summary
    assert scores.per_row == [{"mse": 0.0}, {}, {"mse": 4.0}, {"mse": 0.0}]
    with pytest.raises(ShapeError, match="all 2 rows failed"):
        score_values([None, None], [1.0, 2.0])
    with pytest.raises(NonFiniteError, match="row 1"):
        score_values([1.0, math.nan], [1.0, 2.0])


def test_perplexity_is_the_exponential_of_torch_s_loss() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(12, 7, dtype=torch.float64), torch.randint(7, (12,))
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    nats = [float(losses[:5].sum()), float(losses[5:].sum())]
    scores = score_perplexity(nats, [5, 7], [20, 31])
    assert scores.summary["perplexity"] == pytest.approx(float(losses.mean().exp()))
    bits = float(losses.sum()) / math.log(2) / 51
    assert scores.summary["bits_per_byte"] == pytest.approx(bits)
    assert scores.per_row[1]["perplexity"] == pytest.approx(float(losses[5:].mean().exp()))


def test_a_uniform_guess_over_bytes_costs_eight_bits() -> None:
    scores = score_perplexity([3 * math.log(256)], [3], [3])
    assert scores.summary == {"perplexity": pytest.approx(256), "bits_per_byte": pytest.approx(8)}
    assert "bits_per_byte" not in score_perplexity([1.0], [3]).summary


def test_texts_that_cannot_be_scored() -> None:
    scores = score_perplexity([2.0, None], [4, 0], [8, 0])
    assert scores.per_row[1] == {}
    assert scores.summary == score_perplexity([2.0], [4], [8]).summary
    assert score_perplexity([1e6], [1]).summary["perplexity"] == math.inf
    with pytest.raises(ShapeError, match="row 0 has num_tokens 0"):
        score_perplexity([1.0], [0])
    with pytest.raises(ShapeError, match="row 0 has num_bytes 0"):
        score_perplexity([1.0], [1], [0])
    with pytest.raises(ShapeError, match="1 predictions against 2"):
        score_perplexity([1.0], [1], [1, 2])
    with pytest.raises(NonFiniteError, match="inf"):
        score_perplexity([math.inf], [1])
    with pytest.raises(ShapeError, match="all 1 rows failed"):
        score_perplexity([None], [1])
