"""Ranked candidates against the right ones: retrieval with embeddings, and filled masks."""

from collections.abc import Hashable, Sequence

import torch
from torch import nn

from longformer_core.errors import ConfigError, NonFiniteError, ShapeError
from longformer_core.metrics.scores import Scores, as_list, as_set, check_rows, mean_of_rows

_SETS = (str, list, tuple, set, frozenset)
_BLOCK = 256  # queries compared with all documents at once


def score_rankings(
    predictions: Sequence[Sequence[Hashable] | None],
    references: Sequence[str | Sequence[Hashable]],
    *,
    k: Sequence[int] = (1, 5, 10),
) -> Scores:
    """Recall at k and the mean reciprocal rank of ranked candidates, the best first.

    A row is a query: its ranked documents, and those that are relevant (a lone str is one).
    recall@k is the share of its relevant documents among the first k; mrr is 1 over the rank of
    the first relevant one, 0 where the ranking holds none. Both are means over queries. With one
    relevant candidate a row, as for a filled mask, recall@k is accuracy among the first k. A failed
    row has ranked nothing and scores 0.
    Raises: ShapeError when a row has no relevant document or ranks one twice; ConfigError for k.
    """
    if not k or min(k) < 1:
        raise ConfigError(f"k is {tuple(k)}; give numbers from 1")
    num_failed = check_rows(predictions, references, (str, list, tuple), _SETS)
    rows = []
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        ranked, relevant = as_list(prediction), as_set(reference)
        if not relevant:
            raise ShapeError(f"row {row} has no relevant document; leave the row out")
        if len(set(ranked)) < len(ranked):
            raise ShapeError(f"row {row} ranks a document twice; keep its best rank alone")
        ranks = [rank for rank, document in enumerate(ranked, 1) if document in relevant]
        scores = {f"recall@{n}": sum(rank <= n for rank in ranks) / len(relevant) for n in k}
        rows.append(scores | {"mrr": 1 / ranks[0] if ranks else 0.0})
    return Scores(mean_of_rows(rows), rows, num_failed)


def rank_documents(
    queries: Sequence[Sequence[float] | None],
    documents: Sequence[Sequence[float] | None],
    *,
    k: int = 100,
) -> list[list[int] | None]:
    """The indices of the `k` documents nearest to each query by cosine, the nearest first.

    Equal similarities stay in the order of the documents, and a vector of zeros is similar to none.
    A query that failed (None) gets None; a document that failed is in no ranking. Computed in
    float64.
    Raises: ShapeError, NonFiniteError, ConfigError.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; give at least 1")
    asked = [row for row, vector in enumerate(queries) if vector is not None]
    found = [row for row, vector in enumerate(documents) if vector is not None]
    rankings: list[list[int] | None] = [None] * len(queries)
    if not asked or not found:
        raise ShapeError(
            f"{len(asked)} queries and {len(found)} documents have a vector; need both"
        )
    targets = _unit_vectors([documents[row] for row in found])
    sources = _unit_vectors([queries[row] for row in asked])
    if sources.shape[1] != targets.shape[1]:
        raise ShapeError(
            f"queries have {sources.shape[1]} numbers and documents {targets.shape[1]}; embed both "
            "with the same model"
        )
    for start in range(0, len(asked), _BLOCK):
        similarity = sources[start : start + _BLOCK] @ targets.T
        order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :k].tolist()
        for row, nearest in zip(asked[start : start + _BLOCK], order, strict=True):
            rankings[row] = [found[i] for i in nearest]
    return rankings


def _unit_vectors(vectors: Sequence[Sequence[float] | None]) -> torch.Tensor:
    try:
        table = torch.tensor(vectors, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"embeddings must be lists of equally many numbers: {error}") from error
    if table.ndim != 2:
        raise ShapeError(f"an embedding must be a list of numbers; got {table.ndim - 1} levels")
    if not table.isfinite().all():
        raise NonFiniteError("an embedding holds NaN or infinity; embed its row again")
    return nn.functional.normalize(table, dim=1)
