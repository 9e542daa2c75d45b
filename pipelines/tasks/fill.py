"""Masked language modelling: what could stand in place of every `<mask>` of a document."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines.errors import Refused
from pipelines.tasks.base import Count, Document, Output, Process
from pipelines.tasks.encoding import EncodingOptions, EncodingTask, owners, softmax
from pipelines.tasks.preparation import Frame, single_frame, tokenizer_of

if TYPE_CHECKING:
    from longformer_core.metrics import Scores


class FillOptions(EncodingOptions):
    top_k: Count = Field(5, description="Tokens for every mask, likeliest first.")
    targets: tuple[str, ...] = Field(
        (), description="Choose among these only, each a single token; a space before it counts."
    )


@dataclass(frozen=True)
class Fill(EncodingTask):
    """The likeliest tokens of every mask, in the order of the masks.

    A mask is answered from the window in which it has the most context.
    target_ids: the tokens to choose among; empty for all.
    """

    options: FillOptions
    target_ids: tuple[int, ...]

    name = "fill"
    options_class = FillOptions
    models: ClassVar = {"longformer": "LongformerForMaskedLM"}
    default_stride = 0.25

    @classmethod
    def _resolve(cls, options: Any, directory: Path) -> dict[str, Any]:
        targets = target_ids(tokenizer_of(options.model), options.targets)
        return super()._resolve(options, directory) | {"target_ids": targets}

    @property
    def columns(self) -> pa.Schema:
        fill = pa.struct(
            [
                pa.field("token", pa.string()),
                pa.field("token_id", pa.int32()),
                pa.field("score", pa.float64()),
            ]
        )
        return pa.schema([pa.field("fills", pa.list_(pa.list_(fill)))])

    def frames(self, block: pa.Table) -> list[list[Frame]]:
        is_global = self.options.global_attention == "first"
        return [
            [single_frame(tokenizer_of(self.model), is_first_global=is_global)]
        ] * block.num_rows

    def process(self, document: Document) -> Process:
        tokenizer = tokenizer_of(self.model)
        end = max(window.start + window.size for window in document.windows)
        owner = owners(document.windows, end)
        asked, places = [], []
        for number, window in enumerate(document.windows):
            slots = window.first + np.flatnonzero(owner[window.start :][: window.size] == number)
            masks = slots[window.input_ids[slots] == tokenizer.mask_token_id]
            if len(masks):
                asked.append(self.request(window, logit_positions=masks.tolist()))
                places.append(masks + window.start - window.first)
        results = (yield asked) if asked else []
        fills = {
            place: self._fills(tokenizer, scores)
            for of_window, result in zip(places, results, strict=True)
            for place, scores in zip(of_window, softmax(result.logits.numpy()), strict=True)
        }
        return Output({"fills": [fills[place] for place in sorted(fills)]})

    def _fills(self, tokenizer: Any, scores: np.ndarray) -> list[dict[str, Any]]:
        """scores: [V]."""
        ids = np.array(self.target_ids) if self.target_ids else np.arange(len(scores))
        best = ids[np.argsort(-scores[ids], kind="stable")[: self.options.top_k]]
        return [
            {"token": tokenizer.decode([int(i)]), "token_id": int(i), "score": float(scores[i])}
            for i in best
        ]

    def predictions(self, rows: pa.Table) -> list[Any]:
        """Return the likeliest tokens of every mask, without the spaces around them.

        One that is there with and without a space keeps its better place.
        """
        return [
            None
            if row is None
            else [list(dict.fromkeys(f["token"].strip() for f in m)) for m in row]
            for row in super().predictions(rows)
        ]

    def references(self, rows: pa.Table, given: Sequence[Any]) -> list[Any]:
        for name, row, right in zip(
            rows.column("id").to_pylist(), super().predictions(rows), given, strict=True
        ):
            if row is not None and len(row) != len(right):
                raise Refused(f"row {name!r} has {len(row)} masks and {len(right)} references")
        return [[token.strip() for token in right] for right in given]

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> "Scores":
        """Recall and rank of the right tokens; a reference lists them, one a mask."""
        from longformer_core.metrics import Scores, score_rankings

        masks = [
            (number, None if row is None else row[place], token)
            for number, (row, right) in enumerate(zip(predictions, references, strict=True))
            for place, token in enumerate(right)
        ]
        scores = score_rankings([ranked for _, ranked, _ in masks], [token for *_, token in masks])
        per_row: list[dict[str, float]] = []
        for number in range(len(predictions)):
            own = [s for (row, _, _), s in zip(masks, scores.per_row, strict=True) if row == number]
            names = own[0] if own else {}
            per_row.append({name: float(np.mean([s[name] for s in own])) for name in names})
        return Scores(scores.summary, per_row, sum(row is None for row in predictions))


def target_ids(tokenizer: Any, targets: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of tokens to choose among.

    Raises: Refused for a text that is several tokens, or none.
    """
    encoded = [tokenizer.encode(target, add_special_tokens=False) for target in targets]
    wrong = [repr(t) for t, ids in zip(targets, encoded, strict=True) if len(ids) != 1]
    if wrong:
        raise Refused(f"targets {', '.join(wrong)}: each must be a single token of the vocabulary")
    return tuple(ids[0] for ids in encoded)
