"""Embeddings: one vector a document, from any encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from longformer_core.config import LEDConfig
from pipelines.errors import Refused
from pipelines.tasks.base import Document, Output, Process
from pipelines.tasks.encoding import EncodingOptions, EncodingTask, config_of, mean_by_tokens
from pipelines.tasks.preparation import Frame, single_frame, tokenizer_of

Pooling = Literal["mean", "first", "pooler"]

if TYPE_CHECKING:
    from longformer_core.metrics import Scores


class EmbedOptions(EncodingOptions):
    pooling: Pooling | None = Field(
        None,
        description="Of a window's states: their mean, the first token's, or the pooler's output. "
        "Default: what the directory's sentence-transformers files say, else the mean.",
    )
    normalize: bool | None = Field(
        None, description="Divide by the length. Default: as the directory says, else no."
    )


@dataclass(frozen=True)
class Embed(EncodingTask):
    """The mean of the windows' vectors by tokens.

    The mean of a window is over all its tokens, special ones too, as sentence-transformers has it.
    """

    options: EmbedOptions
    pooling: Pooling
    normalize: bool
    size: int

    name = "embed"
    options_class = EmbedOptions
    models: ClassVar = {"longformer": "LongformerModel", "led": "LEDModel"}
    takes_any_head = True

    @classmethod
    def _resolve(cls, options: Any, directory: Path) -> dict[str, Any]:
        from longformer_core.checkpoints.pooling import read_pooling

        stored = read_pooling(directory)
        pooling = options.pooling
        if pooling is None and stored is not None and stored.mode is not None:
            pooling = {"mean": "mean", "cls": "first"}.get(stored.mode)
            if pooling is None:
                raise Refused(
                    f"--pooling: {directory} was made with {stored.mode} pooling, which is not "
                    "available; choose mean, first or pooler"
                )
        normalize = options.normalize
        if normalize is None:
            normalize = bool(stored and stored.normalize)
        config = config_of(directory)
        if pooling == "pooler" and isinstance(config, LEDConfig):
            raise Refused("--pooling pooler: LED has no pooler; choose mean or first")
        size = config.d_model if isinstance(config, LEDConfig) else config.hidden_size
        found = super()._resolve(options, directory)
        return found | {"pooling": pooling or "mean", "normalize": normalize, "size": size}

    @property
    def columns(self) -> pa.Schema:
        return pa.schema([pa.field("embedding", pa.list_(pa.float32(), self.size))])

    def frames(self, block: pa.Table) -> list[list[Frame]]:
        is_global = self.options.global_attention == "first"
        return [
            [single_frame(tokenizer_of(self.model), is_first_global=is_global)]
        ] * block.num_rows

    def _fingerprint_options(self) -> dict[str, Any]:
        return super()._fingerprint_options() | {
            "pooling": self.pooling,
            "normalize": self.normalize,
        }

    def _loading_options(self) -> dict[str, Any]:
        # A pooler that nothing is asked of need not be there.
        is_wanted = self.pooling == "pooler" or self.model_class != "LongformerModel"
        return {} if is_wanted else {"add_pooling_layer": False}

    def process(self, document: Document) -> Process:
        wanted: dict[str, Any] = {"want": (self.pooling,)}
        results = yield [
            self.request(
                window,
                **wanted,
                mean_positions=range(len(window.input_ids)) if self.pooling == "mean" else None,
            )
            for window in document.windows
        ]
        vectors = [getattr(result, self.pooling).numpy() for result in results]
        vector = mean_by_tokens(vectors, document.windows)
        if self.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return Output({"embedding": vector.astype(np.float32)})

    def output_row_bytes(self) -> int:
        """Return four bytes a number, and the counts."""
        return 4 * self.size + 200

    def describe(self) -> dict[str, str]:
        said = f"{self.size} numbers, {self.pooling}{', of length 1' if self.normalize else ''}"
        return super().describe() | {"embedding": said}

    def predictions(self, rows: pa.Table) -> list[Any]:
        """Return the ids of the nearest documents among all rows, at most 100."""
        from longformer_core.metrics import rank_documents

        vectors, ids = super().predictions(rows), rows.column("id").to_pylist()
        # A document is the nearest to itself, which says nothing.
        return [
            None if each is None else [ids[i] for i in each if i != row][:100]
            for row, each in enumerate(rank_documents(vectors, vectors, k=101))
        ]

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> "Scores":
        """Recall and rank of the documents that should be nearest.

        A reference is the id of a row, or a list of ids.
        """
        from longformer_core.metrics import score_rankings

        return score_rankings(predictions, references)
