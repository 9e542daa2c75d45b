"""Summarization with LED: a document becomes a summary, whatever its length.

A document longer than a window is read in several, if asked: the summaries of its windows are
joined and summarized again until one window holds them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from longformer_core.config import LEDConfig
from longformer_core.errors import LongformerError
from longformer_core.generation.config import GenerationConfig
from longformer_core.hub import resolve
from pipelines.errors import Refused
from pipelines.rows import InputColumn
from pipelines.tasks.base import Count, Document, Output, Process, Task, TaskOptions, text_input
from pipelines.tasks.preparation import Window, cut, single_frame, tokenizer_of

if TYPE_CHECKING:
    from longformer_core.generation.engine import Engine
    from longformer_core.generation.request import Generation, Request
    from longformer_core.metrics import Scores


class SummarizeOptions(TaskOptions):
    """Decoding that is not asked for comes from the model's generation_config.json.

    An LED writes; an encoder quotes sentences, which the last three are about.
    """

    num_beams: Count | None = Field(None, description="Beams of the search.")
    max_new_tokens: Count | None = Field(None, description="The longest summary, in tokens.")
    min_length: Annotated[int, Field(ge=0)] | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    early_stopping: Literal["true", "false", "never"] | None = None
    do_sample: bool = Field(False, description="Sample; each row has its own seed.")
    seed: int = Field(0, description="Of sampling.")
    max_rounds: Count = Field(
        4, description="With windows: how often summaries are summarized again, at most."
    )
    keep_levels: bool = Field(
        False, description="With windows: write the summaries of every round to `levels`."
    )
    num_sentences: Count | None = Field(
        None, description="With an encoder: how many sentences are quoted. Default: 5."
    )
    query: str | None = Field(
        None, description="With an encoder: quote what is nearest to this text."
    )
    query_column: str | None = Field(None, description="The same, with a text for each row.")


DECODING = (
    "num_beams",
    "max_new_tokens",
    "min_length",
    "length_penalty",
    "no_repeat_ngram_size",
)


@dataclass(frozen=True)
class Summarize(Task):
    """Summaries by an encoder-decoder. `generation` holds the resolved decoding options."""

    options: SummarizeOptions
    generation: GenerationConfig

    name = "summarize"
    options_class = SummarizeOptions

    @classmethod
    def from_options(cls, options: Any, *, device: str) -> Any:
        """Check and resolve as every task; an encoder's directory gives `ExtractiveSummarize`."""
        from pipelines.tasks.extract import ExtractiveSummarize

        if model_type_of(options.model) in ExtractiveSummarize.models:
            return ExtractiveSummarize.from_options(options, device=device)
        return super().from_options(options, device=device)

    @classmethod
    def inputs_of(cls, options: Any) -> tuple[InputColumn, ...]:
        return summary_inputs(options)

    @classmethod
    def check_directory(cls, directory: Path) -> list[str]:
        from longformer_core.checkpoints.directory import check_directory

        return check_directory(directory)

    @classmethod
    def num_positions(cls, directory: Path) -> int:
        return LEDConfig.from_pretrained(directory).max_encoder_position_embeddings

    @classmethod
    def _resolve(cls, options: SummarizeOptions, directory: Path) -> dict[str, Any]:
        names = ("num_sentences", "query", "query_column")
        refuse_given(options, names, "an LED writes its summaries and quotes no sentences")
        given: dict[str, Any] = {
            name: value for name in DECODING if (value := getattr(options, name)) is not None
        }
        if options.early_stopping is not None:
            given["early_stopping"] = {"true": True, "false": False}.get(
                options.early_stopping, options.early_stopping
            )
        # A model's own do_sample is not taken: a job gives the same rows twice unless asked.
        given["do_sample"] = options.do_sample
        generation = GenerationConfig.from_pretrained(directory).replace(**given)
        generation.check(LEDConfig.from_pretrained(directory))
        return {"generation": generation}

    @property
    def columns(self) -> pa.Schema:
        fields = [pa.field("summary", pa.large_string())]
        if self.options.keep_levels:
            fields.append(pa.field("levels", pa.list_(pa.list_(pa.large_string()))))
        return pa.schema(fields)

    def _fingerprint_options(self) -> dict[str, Any]:
        chosen = self.generation.to_dict() | {
            "max_source_tokens": self.max_source_tokens,
            "on_long": self.options.on_long,
        }
        if self.generation.do_sample:
            chosen["seed"] = self.options.seed
        if self.options.on_long == "windows":
            chosen |= {
                "window_tokens": self.window_tokens,
                "stride_tokens": self.stride_tokens,
                "max_rounds": self.options.max_rounds,
            }
        if self.options.keep_levels:
            chosen["keep_levels"] = True
        return chosen

    def output_row_bytes(self) -> int:
        """Return six bytes a token, and the counts."""
        return 6 * self.generation.total_length + 200

    def describe(self) -> dict[str, str]:
        options = self.generation.to_dict().items()
        said = ", ".join(f"{name}={value}" for name, value in options if value is not None)
        return super().describe() | {"summary": "abstractive", "generation": said}

    def load_engine(self, device: str, memory_share: float) -> "Engine":
        import torch

        from longformer_core.generation.engine import Engine
        from longformer_core.models.led import LEDForConditionalGeneration
        from longformer_core.scheduling.memory import available_bytes

        model = LEDForConditionalGeneration.from_pretrained(
            resolve(self.model), dtype=getattr(torch, self.dtype), device=device
        )
        return Engine(
            model,
            batch_tokens=self.options.batch_tokens,
            memory_bytes=int(memory_share * available_bytes(model.device)),
        )

    def process(self, document: Document) -> Process:
        """Summarize every window, then the joined summaries, until one window holds them all."""
        tokenizer = tokenizer_of(self.model)
        windows = document.windows
        levels: list[list[str]] = []
        while True:
            results = yield [
                self._request(document.id, window, len(levels), place)
                for place, window in enumerate(windows)
            ]
            texts = [self._text(tokenizer, result) for result in results]
            levels.append(texts)
            if len(windows) == 1 or len(levels) > self.options.max_rounds:
                break
            ids = np.asarray(tokenizer.encode("\n".join(texts), add_special_tokens=False), np.int32)
            if len(ids) >= windows[-1].start + windows[-1].size:
                break  # summaries as long as what they summarize never fit
            windows, error = cut(self, ids, [single_frame(tokenizer, is_first_global=True)])
            assert error is None, error
        columns: dict[str, Any] = {"summary": "\n".join(texts)}
        if self.options.keep_levels:
            columns["levels"] = levels
        special = self._special()
        count = sum(i not in special for result in results for i in result.sequences[0])
        return Output(columns, count)

    def _request(self, name: str, window: Window, level: int, place: int) -> "Request":
        from longformer_core.generation.request import Request

        seed = None
        if self.generation.do_sample:
            # The first window's is the document's: a document of one is as if there were none.
            seed = row_seed(
                self.options.seed, f"{name}\0{level}\0{place}" if level or place else name
            )
        ids: Any = window.input_ids
        return Request(ids, self.generation, window.global_positions, seed)

    def _text(self, tokenizer: Any, result: "Generation") -> str:
        return str(tokenizer.decode(result.sequences[0], skip_special_tokens=True))

    def _special(self) -> set[int | None]:
        options = self.generation
        special = {options.decoder_start_token_id, options.bos_token_id, options.pad_token_id}
        return special | set(options.eos_token_ids)

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> "Scores":
        """ROUGE of the summaries; a reference is a text, or a list of them."""
        from longformer_core.metrics import score_summaries

        return score_summaries(predictions, references)


def summary_inputs(options: SummarizeOptions) -> tuple[InputColumn, ...]:
    """Return the columns that a summary of either kind is made of."""
    column = options.query_column
    query = (InputColumn("query", (column,)),) if column is not None else ()
    return (text_input(options), *query)


def model_type_of(model: str) -> str | None:
    """Return what kind of model a directory says that it holds; None where it says nothing."""
    try:
        values = json.loads((resolve(model) / "config.json").read_text(encoding="utf-8"))
    except (LongformerError, OSError, ValueError):
        return None  # told by the check of the directory
    return values.get("model_type") if isinstance(values, dict) else None


def refuse_given(options: SummarizeOptions, names: Sequence[str], why: str) -> None:
    """Raise Refused for options that were given and have no effect."""
    fields = SummarizeOptions.model_fields
    given = [name for name in names if getattr(options, name) != fields[name].default]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise Refused(f"{flags}: {why}")


def row_seed(seed: int, name: str) -> int:
    """Return a row's own seed: the same in every run, whatever rows are beside it. 63 bits."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
