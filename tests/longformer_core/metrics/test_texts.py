"""ROUGE against rouge-score itself and published examples; SQuAD against its official numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from longformer_core.errors import ShapeError
from longformer_core.metrics import score_answers, score_summaries, split_sentences

TYPES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
TEXTS = [
    "The committee met on Monday. It rejected the budget! Members were not surprised.",
    "On Monday the budgets were rejecting.\nNobody in the committees meets on Mondays.",
    'He asked "Why?" Then they left. No answers came',
    "",
    "Привет, мир.",
]


def test_rouge_equals_the_library() -> None:
    library = RougeScorer(TYPES, use_stemmer=True)
    predictions = [p for p in TEXTS for _ in TEXTS]
    references = TEXTS * len(TEXTS)
    for sentences in (True, False):
        scores = score_summaries(predictions, references, sentences=sentences)
        for prediction, reference, row in zip(predictions, references, scores.per_row, strict=True):
            pair = (reference, prediction)
            if sentences:
                pair = (split_sentences(reference), split_sentences(prediction))
            expected = {name: score.fmeasure for name, score in library.score(*pair).items()}
            assert row == expected
        for name in TYPES:
            mean = sum(row[name] for row in scores.per_row) / len(predictions)
            assert scores.summary[name] == pytest.approx(mean, abs=1e-12)
    assert any(0 < row["rouge2"] < 1 for row in scores.per_row)


def test_sentences_change_rouge_lsum_alone() -> None:
    prediction, reference = "Cats sat. Dogs ran.", "Dogs ran. Cats sat."
    cut = score_summaries([prediction], [reference]).summary
    whole = score_summaries([prediction], [reference], sentences=False).summary
    assert cut["rougeLsum"] == 1.0
    assert whole["rougeLsum"] == whole["rougeL"] == cut["rougeL"] == 0.5
    lines = score_summaries([prediction.replace(". ", ".\n")], [reference.replace(". ", ".\n")])
    assert lines.summary == cut


@pytest.mark.parametrize(
    ("reference", "prediction", "name", "value"),
    [
        # The library's own README: precision 6/8, recall 6/9; 5 of 8 and 9 in order.
        (
            "The quick brown fox jumps over the lazy dog",
            "The quick brown dog jumps on the log.",
            "rouge1",
            12 / 17,
        ),
        (
            "The quick brown fox jumps over the lazy dog",
            "The quick brown dog jumps on the log.",
            "rougeL",
            10 / 17,
        ),
        # Lin 2004, section 3.1: two of four words in order.
        ("police killed the gunman", "the gunman kill police", "rougeL", 0.5),
        # The same section, where stemming makes killed and kill one word.
        ("police killed the gunman", "police kill the gunman", "rougeL", 1.0),
        # Lin 2004, section 3.2: the union of w1 w2 and w1 w3 w5 is four of five words.
        ("w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "rougeLsum", 2 * 4 / (5 + 10)),
    ],
)
def test_published_examples(reference: str, prediction: str, name: str, value: float) -> None:
    assert score_summaries([prediction], [reference]).summary[name] == pytest.approx(value)


def test_the_best_of_several_references_counts() -> None:
    scores = score_summaries(["alpha beta"], [["gamma", "alpha beta", "alpha"]])
    assert scores.summary == dict.fromkeys(TYPES, 1.0)
    with pytest.raises(ShapeError, match="row 0 has no reference summary"):
        score_summaries(["alpha"], [[]])
    with pytest.raises(ShapeError, match="not all texts"):
        score_summaries(["alpha"], [["alpha", None]])


def test_split_sentences() -> None:
    text = "It rose 3.5 percent. \u201cReally?\u201d Yes!  2 of 3 e.g. this. (So it was.) Élan."
    assert split_sentences(text).split("\n") == [
        "It rose 3.5 percent.",
        "\u201cReally?\u201d",
        "Yes!",
        "2 of 3 e.g. this.",
        "(So it was.)",
        "Élan.",
    ]
    assert split_sentences("No end\nA line") == "No end\nA line"


@settings(deadline=None)
@given(st.text(alphabet="aZ1 .!?\"')(\n\u201c"))
def test_splitting_keeps_every_word_and_splits_once(text: str) -> None:
    once = split_sentences(text)
    assert once.split() == text.split()
    assert split_sentences(once) == once


@pytest.mark.parametrize(
    ("prediction", "golds", "exact_match", "f1"),
    [
        # Numbers of the official evaluate-v2.0.py.
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("an apple, a day", ["Apple day"], 1, 1),
        ("in 1998", ["1998"], 0, 2 / 3),
        ("New York", ["York New"], 0, 1),
        ("to be or not to be", ["to be"], 0, 2 * 2 / (6 + 2)),
        ("the the", ["the"], 1, 1),  # nothing is left of either
        ("a", [], 1, 1),
        ("", [], 1, 1),
        ("", [""], 1, 1),
        ("", ["the", "!"], 1, 1),
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("blue", ["", "blue"], 1, 1),
        ("", ["", "blue"], 0, 0),  # an empty reference beside a real one does not count
        ("U.S.", ["US"], 1, 1),
        ("well-known", ["well known"], 0, 0),  # punctuation goes without a space
        ("theatre", ["atre"], 0, 0),  # an article is a word
        ("naïve CAFÉ", ["Naïve café"], 1, 1),
        ("cafe", ["café"], 0, 0),  # accents count
        ("“quoted”", ["quoted"], 0, 0),  # only ASCII punctuation goes
        ("a\u00a0 b\tc\n", ["b c"], 1, 1),
        ("東京", ["東京", "Tokyo"], 1, 1),
        ("one two three", ["one", "two three four", "three two"], 0, 0.8),
    ],
)
def test_answers_as_squad(prediction: str, golds: list[str], exact_match: int, f1: float) -> None:
    scores = score_answers([prediction], [golds])
    assert scores.per_row == [{"exact_match": exact_match, "f1": pytest.approx(f1)}]


def test_answers_are_told_apart_by_whether_there_is_one() -> None:
    predictions = ["red", "dark blue", None, "", "green", None]
    references = [["red"], "blue", ["red"], [], [""], []]
    scores = score_answers(predictions, references)
    assert scores.num_failed == 2
    assert scores.summary == {
        "exact_match": pytest.approx(3 / 6),
        "f1": pytest.approx((1 + 2 / 3 + 0 + 1 + 0 + 1) / 6),
        "has_answer_exact_match": pytest.approx(1 / 3),
        "has_answer_f1": pytest.approx((1 + 2 / 3) / 3),
        "no_answer_exact_match": pytest.approx(2 / 3),
    }
    assert score_answers(["red"], ["red"]).summary.keys() == {
        "exact_match",
        "f1",
        "has_answer_exact_match",
        "has_answer_f1",
    }
