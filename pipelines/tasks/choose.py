"""Multiple choice: which of a row's answers fits its document best."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines.rows import InputColumn
from pipelines.tasks.base import Document, Output, Process, text_input
from pipelines.tasks.encoding import EncodingOptions, EncodingTask, mean_by_tokens, softmax
from pipelines.tasks.preparation import Frame, continued_frame, tokenizer_of

if TYPE_CHECKING:
    from longformer_core.metrics import Scores


class ChooseOptions(EncodingOptions):
    choices_column: str = Field("choices", description="A column of lists of strings.")
    question_column: str | None = Field(
        None, description="A question; it stands before each choice."
    )
    global_attention: Literal["default", "first", "none"] = Field(
        "default",
        description="Tokens that attend to everything. default: the question and the choice.",
    )


@dataclass(frozen=True)
class Choose(EncodingTask):
    """The number of the best choice, from 0, and the probability of each.

    A choice's logit is the mean over the windows by tokens.
    """

    options: ChooseOptions

    name = "choose"
    options_class = ChooseOptions
    models: ClassVar = {"longformer": "LongformerForMultipleChoice"}

    @classmethod
    def inputs_of(cls, options: Any) -> tuple[InputColumn, ...]:
        found = [text_input(options), InputColumn("choices", (options.choices_column,), "words")]
        if options.question_column:
            found.append(InputColumn("question", (options.question_column,)))
        return tuple(found)

    @property
    def columns(self) -> pa.Schema:
        return pa.schema(
            [pa.field("choice", pa.int32()), pa.field("scores", pa.list_(pa.float64()))]
        )

    def frames(self, block: pa.Table) -> list[list[Frame]]:
        tokenizer = tokenizer_of(self.model)
        marks = self.options.global_attention
        choices = block.column("__choices").to_pylist()
        questions: list[str | None] = [None] * block.num_rows
        if self.options.question_column:
            questions = block.column("__question").to_pylist()
        texts = [
            [choice if question is None else f"{question} {choice}" for choice in of_row]
            for of_row, question in zip(choices, questions, strict=True)
        ]
        encoded = iter(tokenizer.encode_with_offsets([text for row in texts for text in row]))
        return [
            [
                continued_frame(
                    tokenizer,
                    next(encoded).ids,
                    is_first_global=marks == "first",
                    is_second_global=marks == "default",
                    part=part,
                )
                for part in range(len(row))
            ]
            for row in texts
        ]

    def process(self, document: Document) -> Process:
        results = yield [self.request(window) for window in document.windows]
        logits: dict[int, list[np.ndarray]] = {}
        windows: dict[int, list[Any]] = {}
        for window, result in zip(document.windows, results, strict=True):
            logits.setdefault(window.part, []).append(result.logits.numpy())
            windows.setdefault(window.part, []).append(window)
        merged = [float(mean_by_tokens(logits[p], windows[p])[0]) for p in sorted(logits)]
        scores = softmax(np.array(merged)).tolist()
        return Output({"choice": int(np.argmax(merged)), "scores": scores})

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> "Scores":
        """Accuracy; a reference is the number of the right choice, from 0."""
        from longformer_core.metrics import score_choices

        return score_choices(predictions, references)
