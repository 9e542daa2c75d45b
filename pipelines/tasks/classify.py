"""Classification of whole documents: one label, several, or a number."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines.errors import Refused
from pipelines.rows import InputColumn
from pipelines.tasks.base import Document, Output, Process, text_input
from pipelines.tasks.encoding import (
    EncodingOptions,
    EncodingTask,
    config_of,
    mean_by_tokens,
    softmax,
)
from pipelines.tasks.preparation import Frame, continued_frame, single_frame, tokenizer_of

if TYPE_CHECKING:
    from longformer_core.metrics import Scores


class ClassifyOptions(EncodingOptions):
    pair_column: str | None = Field(
        None, description="A second text, read beside each window of the document."
    )
    merge: Literal["mean", "max"] = Field(
        "mean", description="With windows: the mean of logits by tokens, or the largest."
    )


@dataclass(frozen=True)
class Classify(EncodingTask):
    """The label of a document, and the score of every label, best first.

    Scores are probabilities: of one label among all (softmax), or of each by itself (sigmoid) where
    the config says multi_label_classification or has one label. With problem_type regression the
    score is the model's number.
    """

    options: ClassifyOptions
    problem_type: str | None

    name = "classify"
    options_class = ClassifyOptions
    models: ClassVar = {
        "longformer": "LongformerForSequenceClassification",
        "led": "LEDForSequenceClassification",
    }

    @classmethod
    def _resolve(cls, options: Any, directory: Path) -> dict[str, Any]:
        found = super()._resolve(options, directory)
        return found | {"problem_type": config_of(directory).problem_type}

    @classmethod
    def inputs_of(cls, options: Any) -> tuple[InputColumn, ...]:
        pair = (InputColumn("pair", (options.pair_column,)),) if options.pair_column else ()
        return (text_input(options), *pair)

    @property
    def columns(self) -> pa.Schema:
        score = pa.struct([pa.field("label", pa.string()), pa.field("score", pa.float64())])
        return pa.schema(
            [
                pa.field("label", pa.string()),
                pa.field("score", pa.float64()),
                pa.field("scores", pa.list_(score)),
            ]
        )

    def frames(self, block: pa.Table) -> list[list[Frame]]:
        tokenizer = tokenizer_of(self.model)
        is_global = self.options.global_attention != "none"
        if not self.options.pair_column:
            return [[single_frame(tokenizer, is_first_global=is_global)]] * block.num_rows
        pairs = tokenizer.encode_with_offsets(block.column("__pair"))
        return [[continued_frame(tokenizer, p.ids, is_first_global=is_global)] for p in pairs]

    def process(self, document: Document) -> Process:
        results = yield [self.request(window) for window in document.windows]
        logits = [result.logits.numpy() for result in results]
        if self.options.merge == "max":
            merged = np.max(logits, axis=0)
        else:
            merged = mean_by_tokens(logits, document.windows)
        scores = self._scores(merged).tolist()
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        ranked = [{"label": self.labels[i], "score": scores[i]} for i in order]
        return Output({**ranked[0], "scores": ranked})

    def _scores(self, logits: np.ndarray) -> np.ndarray:
        if self.problem_type == "regression":
            return logits.astype(np.float64)
        if self.problem_type == "multi_label_classification" or len(self.labels) == 1:
            return 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
        return softmax(logits)

    def predictions(self, rows: pa.Table) -> list[Any]:
        """Return the label, all labels of at least 0.5 where there are several, or the number."""
        if self.problem_type == "regression":
            return list(rows.column("score").to_pylist())
        if self.problem_type != "multi_label_classification":
            return super().predictions(rows)
        return [
            None if row is None else [each["label"] for each in row if each["score"] >= 0.5]
            for row in rows.column("scores").to_pylist()
        ]

    def references(self, rows: pa.Table, given: Sequence[Any]) -> list[Any]:  # noqa: ARG002
        if self.problem_type == "regression":
            return list(given)
        if self.problem_type == "multi_label_classification":
            return [[self._label(each) for each in row] for row in given]
        return [self._label(each) for each in given]

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> "Scores":
        """Accuracy and macro F1 of the label, or errors and correlations of a number.

        A reference is a label or its number in the config, a list of either for a model of several
        labels, a number for regression.
        """
        from longformer_core.metrics import score_classes, score_label_sets, score_values

        if self.problem_type == "regression":
            return score_values(predictions, references)
        if self.problem_type == "multi_label_classification":
            return score_label_sets(predictions, references)
        return score_classes(predictions, references)

    def _label(self, given: Any) -> str:
        if not isinstance(given, int):
            return str(given)
        if not 0 <= given < len(self.labels):
            raise Refused(f"label {given}: the model has the labels 0 to {len(self.labels) - 1}")
        return self.labels[given]
