"""Labels against labels: one a row, several a row, choices, and labelled spans."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from longformer_core.errors import ShapeError
from longformer_core.metrics.scores import (
    Scores,
    as_list,
    as_set,
    check_rows,
    f1_score,
    import_library,
    mean_of_rows,
)

Span = tuple[str, int, int]

_SETS = (list, tuple, set, frozenset)


def score_classes(predictions: Sequence[Hashable | None], references: Sequence[Hashable]) -> Scores:
    """Accuracy and macro F1 of one label a row, by scikit-learn.

    macro_f1 is the mean of the F1 of each label that occurs in predictions or references. A failed
    row is wrong, and is no label of its own in the mean. A row has its accuracy, 0 or 1.
    Raises: ShapeError, ConfigError.
    """
    num_failed = check_rows(predictions, references, Hashable)
    metrics = import_library("sklearn.metrics")
    names = dict.fromkeys([*references, *(label for label in predictions if label is not None)])
    index = {name: i for i, name in enumerate(names)}
    expected = [index[label] for label in references]
    predicted = [-1 if label is None else index[label] for label in predictions]
    labels = list(range(len(index)))
    summary = {
        "accuracy": float(metrics.accuracy_score(expected, predicted)),
        "macro_f1": float(
            metrics.f1_score(expected, predicted, labels=labels, average="macro", zero_division=0)
        ),
    }
    return Scores(summary, _right_or_wrong(predicted, expected), num_failed)


def score_choices(predictions: Sequence[int | None], references: Sequence[int]) -> Scores:
    """Accuracy of the index of the choice taken. A failed row is wrong. Raises: ShapeError."""
    num_failed = check_rows(predictions, references, int)
    rows = _right_or_wrong(predictions, references)
    return Scores(mean_of_rows(rows), rows, num_failed)


def _right_or_wrong(
    predictions: Sequence[Any], references: Sequence[Any]
) -> list[dict[str, float]]:
    pairs = zip(predictions, references, strict=True)
    return [{"accuracy": float(predicted == expected)} for predicted, expected in pairs]


def score_label_sets(
    predictions: Sequence[Sequence[Hashable] | None], references: Sequence[Sequence[Hashable]]
) -> Scores:
    """Exact match, micro and macro F1 of any number of labels a row, by scikit-learn.

    exact_match is the share of rows whose labels are all right (subset accuracy). Macro F1 is the
    mean over each label that occurs anywhere. A failed row has no labels. A row has its exact_match
    and its F1, which is 1 where there is no label and none is predicted.
    Raises: ShapeError, ConfigError.
    """
    num_failed = check_rows(predictions, references, _SETS)
    metrics = import_library("sklearn.metrics")
    predicted = [as_set(labels) for labels in predictions]
    expected = [as_set(labels) for labels in references]
    rows = [
        {"exact_match": float(p == e), "f1": f1_score(len(p & e), len(p), len(e))}
        for p, e in zip(predicted, expected, strict=True)
    ]
    names = list(dict.fromkeys(name for labels in [*expected, *predicted] for name in labels))
    hot = [
        [[name in labels for name in names] for labels in side] for side in (expected, predicted)
    ]
    return Scores(
        {
            "exact_match": mean_of_rows(rows)["exact_match"],
            # scikit-learn knows no table without columns.
            "micro_f1": float(metrics.f1_score(*hot, average="micro")) if names else 1.0,
            "macro_f1": float(metrics.f1_score(*hot, average="macro")) if names else 1.0,
        },
        rows,
        num_failed,
    )


def score_spans(
    predictions: Sequence[Sequence[Span] | None], references: Sequence[Sequence[Span]]
) -> Scores:
    """Precision, recall and F1 of entities: spans (label, start, end) that must agree exactly.

    Positions are characters or words, the same on both sides. On the spans of BIO tags, as
    `spans_of_tags` gives them, the numbers are those of seqeval and of CoNLL's evaluation; unlike
    tags, spans may also overlap or nest. Precision, recall and F1 count over all rows (micro);
    macro_f1 is the mean over each label that occurs in predictions or references. A span given
    twice counts once. A failed row has no spans.
    Where nothing is predicted precision is 0, and where nothing is expected recall is 0, unless
    both hold: then there is nothing to get wrong, and all are 1.
    Raises: ShapeError. Source: Tjong Kim Sang and De Meulder 2003.
    """
    num_failed = check_rows(predictions, references, _SETS)
    predicted = [_spans("prediction", row, spans) for row, spans in enumerate(predictions)]
    expected = [_spans("reference", row, spans) for row, spans in enumerate(references)]
    shared = [p & e for p, e in zip(predicted, expected, strict=True)]
    rows = [
        _rates(len(s), len(p), len(e)) for s, p, e in zip(shared, predicted, expected, strict=True)
    ]
    of_label = [
        Counter(label for spans in side for label, _, _ in spans)
        for side in (shared, predicted, expected)
    ]
    summary = _rates(*(counts.total() for counts in of_label))
    labels = sorted(of_label[1] | of_label[2])
    by_label = [{"f1": f1_score(*(counts[label] for counts in of_label))} for label in labels]
    summary["macro_f1"] = mean_of_rows(by_label)["f1"] if by_label else 1.0
    return Scores(summary, rows, num_failed)


def _spans(what: str, row: int, spans: Sequence[Span] | None) -> frozenset[Span]:
    found = []
    for span in as_list(spans):
        match span:
            case [str(label), int(start), int(end)]:
                found.append((label, start, end))
            case _:
                raise ShapeError(
                    f"the {what} of row {row} holds {span!r:.80}; a span is (label, start, end)"
                )
    return frozenset(found)


def _rates(num_shared: int, num_predicted: int, num_expected: int) -> dict[str, float]:
    nothing = float(num_predicted == num_expected == 0)
    return {
        "precision": num_shared / num_predicted if num_predicted else nothing,
        "recall": num_shared / num_expected if num_expected else nothing,
        "f1": f1_score(num_shared, num_predicted, num_expected),
    }


def spans_of_tags(tags: Sequence[str]) -> list[Span]:
    """The entities (label, first word, word after the last) in the BIO tags of one document.

    Read by seqeval, as CoNLL does: an I- without a B- before it begins an entity too.
    Raises: ConfigError.
    """
    get_entities = import_library("seqeval.metrics.sequence_labeling").get_entities
    return [(label, int(first), int(last) + 1) for label, first, last in get_entities(list(tags))]
