"""What the tasks of encoders share: which directories fit, the engine, and merges over windows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.errors import LongformerError
from longformer_core.hub import resolve
from pipelines.tasks.base import Document, Task, TaskOptions
from pipelines.tasks.preparation import Window

if TYPE_CHECKING:
    from longformer_core.encoding.engine import EncodingEngine
    from longformer_core.encoding.request import EncodingRequest

# Which task wants which class; a refusal names those that would fit.
_TASK_OF_CLASS = {
    "LEDForConditionalGeneration": "summarize",
    "LongformerForQuestionAnswering": "answer",
    "LEDForQuestionAnswering": "answer",
    "LongformerForSequenceClassification": "classify",
    "LEDForSequenceClassification": "classify",
    "LongformerForTokenClassification": "tag",
    "LongformerForMultipleChoice": "choose",
    "LongformerForMaskedLM": "fill",
}


class EncodingOptions(TaskOptions):
    """Options of every task of an encoder."""

    global_attention: Literal["default", "first", "none"] = Field(
        "default",
        description="Tokens that attend to everything. default: what the model was published with.",
    )


@dataclass(frozen=True)
class EncodingTask(Task):
    """A task of an encoder with a head. `labels` are those of the config, by number."""

    options: EncodingOptions
    labels: tuple[str, ...]
    model_class: str

    options_class: ClassVar[type[TaskOptions]] = EncodingOptions
    # Model type of a config.json -> the class whose weights the task needs.
    models: ClassVar[Mapping[str, str]]
    takes_any_head: ClassVar[bool] = False

    @classmethod
    def check_directory(cls, directory: Path) -> list[str]:
        values, problems = _read_config(directory)
        if problems:
            return problems
        model_type, given = values.get("model_type"), _architecture(values)
        wanted = cls.models.get(str(model_type))
        if wanted is None:
            return [
                f"{directory} holds a model of type {model_type!r}; {cls.name} takes "
                f"{' or '.join(cls.models)}{_fitting(given)}"
            ]
        if given is not None and given != wanted and not cls.takes_any_head:
            return [f"{directory} holds a {given}; {cls.name} takes a {wanted}{_fitting(given)}"]
        try:
            config_of(directory)
        except LongformerError as error:
            return [str(error)]
        return []

    @classmethod
    def num_positions(cls, directory: Path) -> int:
        config = config_of(directory)
        if isinstance(config, LEDConfig):
            return config.max_encoder_position_embeddings
        return config.max_length

    @classmethod
    def _resolve(cls, options: Any, directory: Path) -> dict[str, Any]:  # noqa: ARG003
        values, _ = _read_config(directory)
        config = config_of(directory)
        named = {int(number): str(name) for number, name in values.get("id2label", {}).items()}
        labels = tuple(named.get(i, f"LABEL_{i}") for i in range(config.num_labels))
        return {"labels": labels, "model_class": cls.models[values["model_type"]]}

    def _loading_options(self) -> dict[str, Any]:
        """Return what else the model is loaded with."""
        return {}

    def load_engine(self, device: str, memory_share: float) -> "EncodingEngine":
        import torch

        import longformer_core
        from longformer_core.encoding.engine import EncodingEngine
        from longformer_core.scheduling.memory import available_bytes

        model = getattr(longformer_core, self.model_class).from_pretrained(
            resolve(self.model),
            dtype=getattr(torch, self.dtype),
            device=device,
            **self._loading_options(),
        )
        return EncodingEngine(
            model,
            batch_tokens=self.options.batch_tokens,
            memory_bytes=int(memory_share * available_bytes(model.device)),
        )

    def request(self, window: Window, **wanted: Any) -> "EncodingRequest":
        """Return what an engine is asked about a window."""
        from longformer_core.encoding.request import EncodingRequest

        marks: Any = window.global_positions
        ids: Any = window.input_ids
        types: Any = window.token_type_ids
        return EncodingRequest(ids, global_positions=marks, token_type_ids=types, **wanted)


def softmax(logits: np.ndarray) -> np.ndarray:
    """[..., C] -> [..., C], in float64."""
    powers: np.ndarray = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers


def mean_by_tokens(values: Sequence[np.ndarray], windows: Sequence[Window]) -> np.ndarray:
    """Return the mean of a value per window, weighted by the document's tokens in each.

    A single window's value comes back as it is.
    """
    if len(values) == 1:
        return values[0]
    # A document without tokens of its own has one window.
    return np.average(np.stack(values), axis=0, weights=[window.size for window in windows])


def owners(windows: Sequence[Window], num_tokens: int) -> np.ndarray:
    """[num_tokens] the window in which each token has the most context; the first of equals.

    -1 where a token is in no window.

    A token's context reaches to the nearer edge of the window; an edge of the document is none.
    """
    best = np.full(num_tokens, -1.0)
    owner = np.full(num_tokens, -1, np.int64)
    for number, window in enumerate(windows):
        place = np.arange(window.size, dtype=np.float64)
        left = place if window.start else np.full(window.size, np.inf)
        end = window.start + window.size
        right = place[::-1] if end < num_tokens else np.full(window.size, np.inf)
        context = np.minimum(left, right)
        here = slice(window.start, end)
        better = context > best[here]
        best[here] = np.where(better, context, best[here])
        owner[here] = np.where(better, number, owner[here])
    return owner


def token_values(document: Document, values: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
    """[num_tokens, C] the value of each token of a document from the window it belongs to.

    values: [N, C] a window. A token that is in no window has zeros.
    """
    owner = owners(document.windows, num_tokens)
    out = np.zeros((num_tokens, *values[0].shape[1:]), values[0].dtype)
    for number, (window, value) in enumerate(zip(document.windows, values, strict=True)):
        own = np.flatnonzero(owner == number)
        out[own] = value[own - window.start + window.first]
    return out


def task_of(directory: Path) -> str | None:
    """Return the task that a model directory's class is made for; None where it does not say."""
    values, _ = _read_config(directory)
    given = _architecture(values)
    if given in ("LongformerModel", "LEDModel"):
        return "embed"
    return _TASK_OF_CLASS.get(str(given))


def _read_config(directory: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, [f"{directory}: config.json cannot be read: {error}"]
    if not isinstance(values, dict):
        return {}, [f"{directory}: config.json must hold names and values"]
    return values, []


def config_of(directory: Path) -> LEDConfig | LongformerConfig:
    """Return the config of a model directory, whichever of the two it is."""
    is_led = _read_config(directory)[0].get("model_type") == "led"
    return (LEDConfig if is_led else LongformerConfig).from_pretrained(directory)


def _architecture(values: Mapping[str, Any]) -> str | None:
    named = values.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else None


def _fitting(given: str | None) -> str:
    task = _TASK_OF_CLASS.get(str(given))
    return f"; this one fits the task {task}, and embed" if task else ""
