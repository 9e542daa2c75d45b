"""Labels and spans against scikit-learn and seqeval."""

import random

import pytest
from seqeval.metrics import classification_report
from sklearn import metrics as sklearn
from sklearn.preprocessing import MultiLabelBinarizer

from longformer_core.errors import ShapeError
from longformer_core.metrics import (
    score_choices,
    score_classes,
    score_label_sets,
    score_spans,
    spans_of_tags,
)


def test_classes_equal_scikit_learn() -> None:
    rng = random.Random(0)
    references = rng.choices(["x", "y", "z"], [6, 3, 1], k=60)
    predictions = [r if rng.random() < 0.6 else rng.choice("wxyz") for r in references]
    scores = score_classes(predictions, references)
    assert scores.summary == {
        "accuracy": pytest.approx(sklearn.accuracy_score(references, predictions)),
        "macro_f1": pytest.approx(sklearn.f1_score(references, predictions, average="macro")),
    }
    # Published in scikit-learn's documentation of f1_score.
    published = score_classes([0, 2, 1, 0, 0, 1], [0, 1, 2, 0, 1, 2]).summary["macro_f1"]
    assert published == pytest.approx(4 / 15)


def test_a_failed_row_is_a_missed_label_and_no_label_of_its_own() -> None:
    scores = score_classes(["x", None, "y", "y"], ["x", "x", "y", "y"])
    assert scores.summary == {"accuracy": 0.75, "macro_f1": pytest.approx((2 / 3 + 1) / 2)}
    assert [row["accuracy"] for row in scores.per_row] == [1, 0, 1, 1]
    assert score_classes([None, None], ["x", "y"]).summary == {"accuracy": 0, "macro_f1": 0}


def test_choices() -> None:
    scores = score_choices([0, 3, None, 2], [0, 1, 0, 2])
    assert scores.summary == {"accuracy": 0.5}
    assert [row["accuracy"] for row in scores.per_row] == [1, 0, 0, 1]


def test_label_sets_equal_scikit_learn() -> None:
    rng = random.Random(1)
    references = [rng.sample("abcde", rng.randint(0, 3)) for _ in range(50)]
    predictions = [[x for x in r if rng.random() < 0.7] + ["a"] * (i % 2) for i, r in
                   enumerate(references)]  # fmt: skip
    scores = score_label_sets(predictions, references)
    binarizer = MultiLabelBinarizer(classes=list("abcde"))
    expected, predicted = binarizer.fit_transform(references), binarizer.transform(predictions)
    assert scores.summary == {
        "exact_match": pytest.approx(sklearn.accuracy_score(expected, predicted)),
        "micro_f1": pytest.approx(sklearn.f1_score(expected, predicted, average="micro")),
        "macro_f1": pytest.approx(sklearn.f1_score(expected, predicted, average="macro")),
    }
    by_row = sklearn.f1_score(expected, predicted, average="samples", zero_division=1)
    assert sum(row["f1"] for row in scores.per_row) / 50 == pytest.approx(by_row)
    assert len({row["f1"] for row in scores.per_row}) > 3


def test_label_sets_without_labels() -> None:
    assert score_label_sets([[], None], [[], []]).summary == dict.fromkeys(
        ["exact_match", "micro_f1", "macro_f1"], 1.0
    )
    scores = score_label_sets([["a"], None], [[], ["b"]])
    assert scores.summary == {"exact_match": 0, "micro_f1": 0, "macro_f1": 0}


def random_tags(rng: random.Random, length: int) -> list[str]:
    """Tags with every fault: I- without B-, labels that change inside an entity."""
    return rng.choices(
        ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG"], [6, 2, 3, 2, 3, 1], k=length
    )


def test_spans_equal_seqeval_on_tags() -> None:
    rng = random.Random(2)
    references = [random_tags(rng, rng.randint(1, 40)) for _ in range(40)]
    predictions = [
        [
            tag if rng.random() < 0.8 else new
            for tag, new in zip(r, random_tags(rng, len(r)), strict=True)
        ]
        for r in references
    ]
    scores = score_spans(
        [spans_of_tags(tags) for tags in predictions], [spans_of_tags(tags) for tags in references]
    )
    report = classification_report(references, predictions, output_dict=True, zero_division=0)
    assert scores.summary == {
        "precision": pytest.approx(report["micro avg"]["precision"]),
        "recall": pytest.approx(report["micro avg"]["recall"]),
        "f1": pytest.approx(report["micro avg"]["f1-score"]),
        "macro_f1": pytest.approx(report["macro avg"]["f1-score"]),
    }
    assert 0.2 < scores.summary["f1"] < 0.9
    for row, expected, predicted in zip(scores.per_row, references, predictions, strict=True):
        if spans_of_tags(expected):
            alone = classification_report(
                [expected], [predicted], output_dict=True, zero_division=0
            )
            assert row["f1"] == pytest.approx(alone["micro avg"]["f1-score"])


def test_the_example_of_seqeval() -> None:
    expected = ["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]
    predicted = ["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]
    scores = score_spans([*map(spans_of_tags, predicted)], [*map(spans_of_tags, expected)])
    assert scores.summary == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "macro_f1": 0.5}
    assert [row["f1"] for row in scores.per_row] == [0.0, 1.0]


def test_spans_of_tags() -> None:
    assert spans_of_tags(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]) == [
        ("PER", 0, 2),
        ("LOC", 3, 4),
        ("LOC", 4, 5),
    ]
    assert spans_of_tags([]) == []


def test_spans_may_nest_and_count_once() -> None:
    nested = [("PER", 0, 30), ("LOC", 10, 20), ["LOC", 10, 20]]
    scores = score_spans([nested], [[("PER", 0, 30), ("LOC", 10, 20), ("LOC", 11, 20)]])
    assert scores.summary["precision"] == 1.0
    assert scores.summary["recall"] == pytest.approx(2 / 3)
    assert scores.summary["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)


def test_rows_without_spans() -> None:
    assert score_spans([[]], [[]]).summary == dict.fromkeys(
        ["precision", "recall", "f1", "macro_f1"], 1.0
    )
    assert set(score_spans([[("PER", 0, 1)]], [[]]).summary.values()) == {0.0}
    assert set(score_spans([None], [[("PER", 0, 1)]]).summary.values()) == {0.0}


@pytest.mark.parametrize("span", [("PER", 0), ("PER", 0.0, 1), (0, 1, "PER"), "PER"])
def test_a_span_is_a_label_and_two_positions(span: object) -> None:
    with pytest.raises(ShapeError, match="reference of row 0 holds"):
        score_spans([[]], [[span]])
