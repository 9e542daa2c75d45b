"""Summaries against summaries (ROUGE) and answers against answers (SQuAD)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from longformer_core.errors import ShapeError
from longformer_core.metrics.scores import (
    Scores,
    as_list,
    check_rows,
    f1_score,
    import_library,
    mean_of_rows,
)

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# An end mark with its closing quotes, white space, then no small letter, behind opening quotes.
_SENTENCE_END = re.compile(r"""([.!?]["'\u2019\u201d)\]]*)\s+(?=["'\u2018\u201c(\[]*[^\W_a-z])""")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_summaries(
    predictions: Sequence[str | None],
    references: Sequence[str | Sequence[str]],
    *,
    sentences: bool = True,
) -> Scores:
    """ROUGE-1, -2, -L and -Lsum of each summary against its reference, and their means.

    The numbers are F-measures of the library rouge-score with Porter stemming. Of several
    references each number takes the best. A failed row scores 0, as an empty summary does.
    rougeL reads a text as one sequence; rougeLsum reads sentences, one a line. With `sentences`
    `split_sentences` first breaks the lines of both sides; without it only the texts' own newlines
    count, as the library does by itself. Published numbers were often cut with nltk's punkt model,
    a download, which knows abbreviations: rougeLsum may differ from them a little. The other three
    numbers do not depend on sentences.
    ROUGE reads the letters a to z and digits alone: texts in other scripts score 0.

    Raises: ShapeError, ConfigError. Source: Lin 2004, as rouge-score 0.1.2 computes it.
    """
    num_failed = check_rows(predictions, references, str, (str, list, tuple))
    scorer = import_library("rouge_score.rouge_scorer").RougeScorer(ROUGE_TYPES, use_stemmer=True)
    rows = []
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        targets, text = _texts(reference, row), prediction or ""
        if not targets:
            raise ShapeError(f"row {row} has no reference summary; leave the row out")
        if sentences:
            targets, text = [split_sentences(target) for target in targets], split_sentences(text)
        best = scorer.score_multi(targets, text)
        rows.append({name: float(best[name].fmeasure) for name in ROUGE_TYPES})
    return Scores(mean_of_rows(rows), rows, num_failed)


def split_sentences(text: str) -> str:
    """The text with a newline after each sentence, by its punctuation; newlines in it stay.

    A sentence ends at `.`, `!` or `?`, and quotes or brackets that close there, when white space
    and then anything but a small letter or a sign follows.
    """
    return _SENTENCE_END.sub(r"\1\n", text)


def score_answers(
    predictions: Sequence[str | None], references: Sequence[str | Sequence[str]]
) -> Scores:
    """Exact match and F1 of the words of each answer, as SQuAD 2.0's official script computes them.

    Both sides are compared in lower case, without ASCII punctuation, without the words a, an and
    the, and with single spaces. Of several references each number takes the best. No references, or
    none that holds a word after that, say that there is no answer, and then only an empty
    prediction is right, with a score of 1. A failed row counts as an empty prediction, so it is
    right where there is no answer: look at `num_failed` too.
    Where such rows exist the summary has has_answer_exact_match and has_answer_f1 over the
    questions with an answer, and no_answer_exact_match over those without.

    Raises: ShapeError. Source: Rajpurkar et al. 2018 (SQuAD 2.0), evaluate-v2.0.py.
    """
    num_failed = check_rows(predictions, references, str, (str, list, tuple))
    rows: list[dict[str, float]] = []
    with_answer: list[dict[str, float]] = []
    without_answer: list[dict[str, float]] = []
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        words = _answer_words(prediction or "")
        expected = [gold for gold in map(_answer_words, _texts(reference, row)) if gold]
        scores = {
            "exact_match": float(words in (expected or [[]])),
            "f1": max(_overlap(words, gold) for gold in expected or [[]]),
        }
        rows.append(scores)
        (with_answer if expected else without_answer).append(scores)
    summary = mean_of_rows(rows)
    if with_answer:
        summary |= {f"has_answer_{k}": v for k, v in mean_of_rows(with_answer).items()}
    if without_answer:
        summary["no_answer_exact_match"] = mean_of_rows(without_answer)["exact_match"]
    return Scores(summary, rows, num_failed)


def _texts(reference: str | Sequence[str], row: int) -> list[str]:
    texts = as_list(reference)
    if not all(isinstance(text, str) for text in texts):
        raise ShapeError(f"the references of row {row} are not all texts: {texts!r:.80}; give str")
    return texts


def _answer_words(text: str) -> list[str]:
    return _ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _overlap(words: list[str], expected: list[str]) -> float:
    return f1_score((Counter(words) & Counter(expected)).total(), len(words), len(expected))
