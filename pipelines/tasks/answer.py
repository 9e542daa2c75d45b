"""Answers to questions, as spans of the document's own text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines.rows import InputColumn
from pipelines.tasks.base import Count, Document, Output, Process, text_input
from pipelines.tasks.encoding import EncodingOptions, EncodingTask, softmax
from pipelines.tasks.preparation import Frame, Window, context_frame, tokenizer_of

if TYPE_CHECKING:
    from longformer_core.metrics import Scores


class AnswerOptions(EncodingOptions):
    question_column: str = Field("question", description="The column that holds the question.")
    max_answer_tokens: Count = Field(30, description="The longest answer, in tokens.")
    top_k: Count = Field(
        1, description="Answers of a document, best first; with more than one in `answers`, too."
    )
    no_answer: bool = Field(
        False, description="Answer nothing where the model finds that likelier than any span."
    )
    global_attention: Literal["default", "first", "none"] = Field(
        "default",
        description="Tokens that attend to everything. default: <s> and the question.",
    )


@dataclass(frozen=True)
class Answer(EncodingTask):
    """The likeliest span of a document, over all its windows.

    The score of a span is the probability of its first token times that of its last, among the
    document's tokens and `<s>` of the same window. Of equal spans the one that begins first in the
    document is taken, then the shorter one. No answer has the probability of `<s>` twice, the
    lowest over the windows: a document has none only if none of its windows has one.
    """

    options: AnswerOptions

    name = "answer"
    options_class = AnswerOptions
    models: ClassVar = {
        "longformer": "LongformerForQuestionAnswering",
        "led": "LEDForQuestionAnswering",
    }
    needs_text = True
    default_stride = 0.125

    @classmethod
    def inputs_of(cls, options: Any) -> tuple[InputColumn, ...]:
        return (text_input(options), InputColumn("question", (options.question_column,)))

    @property
    def columns(self) -> pa.Schema:
        fields = [
            pa.field("answer", pa.large_string()),
            pa.field("score", pa.float64()),
            pa.field("start", pa.int64()),
            pa.field("end", pa.int64()),
        ]
        if self.options.top_k > 1:
            fields.append(pa.field("answers", pa.list_(pa.struct(fields))))
        return pa.schema(fields)

    def frames(self, block: pa.Table) -> list[list[Frame]]:
        tokenizer = tokenizer_of(self.model)
        marks = self.options.global_attention
        questions = tokenizer.encode_with_offsets(block.column("__question"))
        return [
            [
                context_frame(
                    tokenizer, q.ids, num_global={"none": 0, "first": 1}.get(marks, 1 + len(q.ids))
                )
            ]
            for q in questions
        ]

    def process(self, document: Document) -> Process:
        results = yield [self.request(window) for window in document.windows]
        assert document.text is not None
        assert document.offsets is not None
        # Neighbouring windows may find the same span; its better score counts.
        scores: dict[tuple[int, int], float] = {}
        nothing = 1.0
        for window, result in zip(document.windows, results, strict=True):
            start, end = result.start_logits.numpy(), result.end_logits.numpy()
            found, null = best_spans(
                start, end, window, self.options.max_answer_tokens, self.options.top_k
            )
            for score, *ends in found:
                scores[ends[0], ends[1]] = max(score, scores.get((ends[0], ends[1]), 0.0))
            nothing = min(nothing, null)
        answers = [
            self._answer(document, score, first, last)
            for (first, last), score in sorted(scores.items(), key=lambda each: (-each[1], each[0]))
        ]
        if self.options.no_answer or not answers:
            none = {"answer": None, "score": nothing, "start": None, "end": None}
            place = sum(each["score"] >= nothing for each in answers)
            answers.insert(place, none)
        answers = answers[: self.options.top_k]
        return Output(answers[0] | ({"answers": answers} if self.options.top_k > 1 else {}))

    def _answer(self, document: Document, score: float, first: int, last: int) -> dict[str, Any]:
        assert document.text is not None
        assert document.offsets is not None
        begin, end = int(document.offsets[first, 0]), int(document.offsets[last, 1])
        return {"answer": document.text[begin:end], "score": score, "start": begin, "end": end}

    def predictions(self, rows: pa.Table) -> list[Any]:
        """Return the answers; a good row without one has an empty text, unlike a failed row."""
        is_good = rows.column("error").is_null().to_pylist()
        found = zip(super().predictions(rows), is_good, strict=True)
        return [answer or "" if good else None for answer, good in found]

    def references(self, rows: pa.Table, given: Sequence[Any]) -> list[Any]:  # noqa: ARG002
        return [each["text"] if isinstance(each, dict) else each for each in given]

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> "Scores":
        """Exact match and F1 as SQuAD has them.

        A reference is a text, a list of them (none: there is no answer), or SQuAD's struct of
        texts and places.
        """
        from longformer_core.metrics import score_answers

        return score_answers(predictions, references)


def best_spans(
    start_logits: np.ndarray, end_logits: np.ndarray, window: Window, max_tokens: int, count: int
) -> tuple[list[tuple[float, int, int]], float]:
    """Return (score, first token, last token) of a window's best spans, and no answer's score.

    Tokens are counted in the document; both ends belong to the span.
    Shapes: start_logits, end_logits [N].
    """
    own = slice(window.first, window.first + window.size)
    starts = softmax(np.concatenate([start_logits[:1], start_logits[own]]))
    ends = softmax(np.concatenate([end_logits[:1], end_logits[own]]))
    nothing = float(starts[0] * ends[0])
    starts, ends = starts[1:], ends[1:]
    found: list[tuple[float, int, int]] = []
    # A span length at a time: no [N, N] matrix.
    for extra in range(min(max_tokens, window.size)):
        scores = starts[: window.size - extra] * ends[extra:]
        best = [scores.argmax()] if count == 1 else np.argsort(-scores, kind="stable")[:count]
        for place in map(int, best):
            first = window.start + place
            found.append((float(scores[place]), first, first + extra))
    found.sort(key=lambda span: (-span[0], span[1], span[2]))
    return found[:count], nothing
