"""Numbers against numbers, and how well a model predicts a text."""

import math
from collections.abc import Sequence
from math import fsum
from numbers import Integral, Real

from longformer_core.errors import NonFiniteError, ShapeError
from longformer_core.metrics.scores import Scores, check_rows, import_library


def score_values(predictions: Sequence[float | None], references: Sequence[float]) -> Scores:
    """Mean squared error, and Pearson's and Spearman's correlation by scipy.

    A failed row is left out, since no number is empty; its scores are an empty dict. Where all
    predictions or all references are equal (one row, too), neither correlation is defined: both are
    0, as nothing was told apart. A row has its squared error.
    Raises: ShapeError, also when every row failed; NonFiniteError; ConfigError.
    """
    num_failed = check_rows(predictions, references, Real)
    pairs = [
        None if predicted is None else (float(predicted), float(expected))
        for predicted, expected in zip(predictions, references, strict=True)
    ]
    kept = {row: pair for row, pair in enumerate(pairs) if pair is not None}
    if not kept:
        raise ShapeError(f"all {num_failed} rows failed; there is no value to score")
    for row, pair in kept.items():
        if not all(map(math.isfinite, pair)):
            raise NonFiniteError(f"row {row} has the values {pair}; only finite ones can be scored")
    rows = [{} if pair is None else {"mse": (pair[0] - pair[1]) ** 2} for pair in pairs]
    predicted, expected = map(list, zip(*kept.values(), strict=True))
    summary = {"mse": fsum(rows[row]["mse"] for row in kept) / len(kept)}
    stats = import_library("scipy.stats")
    varied = len(set(predicted)) > 1 and len(set(expected)) > 1
    for name, correlate in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        summary[name] = float(correlate(predicted, expected).statistic) if varied else 0.0
    return Scores(summary, rows, num_failed)


def score_perplexity(
    nats: Sequence[float | None],
    num_tokens: Sequence[int],
    num_bytes: Sequence[int] | None = None,
) -> Scores:
    """Perplexity of texts and, with `num_bytes`, bits per byte, from a model's summed losses.

    Each row is one text: its negative log likelihood in nats summed over the predicted tokens, how
    many these are, and how many bytes of UTF-8 they spell. perplexity is exp(nats / tokens),
    bits_per_byte nats / (ln 2 x bytes), over the sums of all rows, so long texts weigh more; only
    bits per byte compares models with different tokenizers. Perplexity is infinite beyond the
    largest float. A failed row (None) is left out; its scores are an empty dict.
    Raises: ShapeError, also when every row failed; NonFiniteError.
    """
    num_failed = check_rows(nats, num_tokens, Real, Integral)
    if num_bytes is not None:
        check_rows(nats, num_bytes, Real, Integral)
    sizes = {"num_tokens": num_tokens} | ({} if num_bytes is None else {"num_bytes": num_bytes})
    kept = [row for row, loss in enumerate(nats) if loss is not None]
    if not kept:
        raise ShapeError(f"all {num_failed} rows failed; there is no text to score")
    losses = [0.0 if loss is None else float(loss) for loss in nats]
    for row in kept:
        if not math.isfinite(losses[row]):
            raise NonFiniteError(f"row {row} has a loss of {nats[row]} nats; it must be finite")
        for name, counts in sizes.items():
            if counts[row] < 1:
                raise ShapeError(f"row {row} has {name} {counts[row]}; give at least 1")

    def scores(rows: list[int]) -> dict[str, float]:
        total = fsum(losses[row] for row in rows)
        per_token = total / sum(num_tokens[row] for row in rows)
        numbers = {"perplexity": math.exp(per_token) if per_token < 709 else math.inf}
        if num_bytes is not None:
            num = sum(num_bytes[row] for row in rows)
            numbers["bits_per_byte"] = total / (math.log(2) * num)
        return numbers

    rows = [{} if loss is None else scores([row]) for row, loss in enumerate(nats)]
    return Scores(scores(kept), rows, num_failed)
