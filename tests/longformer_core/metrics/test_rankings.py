"""Recall at k, reciprocal ranks, and the rankings that embeddings give."""

import math
import random

import pytest
from sklearn.metrics import label_ranking_average_precision_score
from sklearn.metrics.pairwise import cosine_similarity

from longformer_core.errors import ConfigError, NonFiniteError, ShapeError
from longformer_core.metrics import rank_documents, score_rankings


def test_the_textbook_example_of_mrr() -> None:
    """Three queries with the right plural at ranks 3, 2 and 1: (1/3 + 1/2 + 1) / 3."""
    predictions = [
        ["catten", "cati", "cats"],
        ["torii", "tori", "toruses"],
        ["viruses", "virii", "viri"],
    ]
    scores = score_rankings(predictions, [["cats"], "tori", ["viruses"]], k=(1, 2))
    assert scores.summary == {
        "recall@1": pytest.approx(1 / 3),
        "recall@2": pytest.approx(2 / 3),
        "mrr": pytest.approx(11 / 18),
    }
    assert scores.per_row[1] == {"recall@1": 0.0, "recall@2": 1.0, "mrr": 0.5}


def test_recall_is_the_share_of_the_relevant() -> None:
    scores = score_rankings([[4, 1, 2, 3], [9]], [[1, 3], [8]], k=(1, 2, 10))
    assert [row["recall@2"] for row in scores.per_row] == [0.5, 0.0]
    assert scores.summary == {"recall@1": 0, "recall@2": 0.25, "recall@10": 0.5, "mrr": 0.25}


def test_mrr_equals_scikit_learn_with_one_relevant_document() -> None:
    rng = random.Random(3)
    orders = [rng.sample(range(10), 10) for _ in range(30)]
    relevant = [rng.randrange(10) for _ in orders]
    table = [[int(d == r) for d in range(10)] for r in relevant]
    values = [[-order.index(d) for d in range(10)] for order in orders]
    expected = label_ranking_average_precision_score(table, values)
    found = score_rankings(orders, [[r] for r in relevant]).summary["mrr"]
    assert found == pytest.approx(expected)


def test_rankings_that_cannot_be_scored() -> None:
    with pytest.raises(ShapeError, match="row 0 has no relevant"):
        score_rankings([["a"]], [[]])
    with pytest.raises(ShapeError, match="row 1 ranks a document twice"):
        score_rankings([["a"], ["a", "a"]], [["a"], ["a"]])
    with pytest.raises(ConfigError, match="k is"):
        score_rankings([["a"]], [["a"]], k=(0,))


def test_documents_are_ranked_by_cosine() -> None:
    rng = random.Random(4)
    queries = [[rng.gauss(0, 1) for _ in range(6)] for _ in range(300)]
    documents = [[rng.gauss(0, 3) for _ in range(6)] for _ in range(40)]
    expected = (-cosine_similarity(queries, documents)).argsort(axis=1, kind="stable")
    assert rank_documents(queries, documents) == expected.tolist()
    assert rank_documents(queries, documents, k=3) == expected[:, :3].tolist()


def test_failed_vectors_and_ties() -> None:
    documents = [[0.0, 1.0], None, [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    assert rank_documents([[1.0, 0.0], None], documents) == [[2, 3, 0, 4], None]
    assert score_rankings(rank_documents([None, [0, 1]], documents), [[0], [0]]).num_failed == 1


def test_vectors_that_cannot_be_ranked() -> None:
    with pytest.raises(ShapeError, match="2 numbers and documents 3"):
        rank_documents([[1, 2]], [[1, 2, 3]])
    with pytest.raises(ShapeError, match="equally many"):
        rank_documents([[1, 2]], [[1, 2], [1]])
    with pytest.raises(ShapeError, match="0 queries and 1 documents"):
        rank_documents([None], [[1]])
    with pytest.raises(ShapeError, match="list of numbers"):
        rank_documents([1.0], [2.0])  # type: ignore[list-item]
    with pytest.raises(NonFiniteError, match="NaN"):
        rank_documents([[math.nan]], [[1.0]])
    with pytest.raises(ConfigError, match="k is 0"):
        rank_documents([[1.0]], [[1.0]], k=0)
