"""What the models of the published interface return.

Shape letters: B documents, S tokens of the longest, d hidden size, V vocabulary, C labels.
Source: transformers 5.23, names and order of the fields.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass
class ModelOutput:
    """Fields by attribute, by key, or by position among those that are not None.

    Raises: KeyError for a key that is no field or is None; IndexError for a position too far.
    """

    def items(self) -> list[tuple[str, Any]]:
        """Return name and value of every field that is not None, in order."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return [(name, value) for name, value in named if value is not None]

    def keys(self) -> list[str]:
        """Return the names of the fields that are not None, in order."""
        return [name for name, _ in self.items()]

    def values(self) -> list[Any]:
        """Return the values of the fields that are not None, in order."""
        return [value for _, value in self.items()]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values of the fields that are not None, in order."""
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.items())


@dataclass
class LongformerBaseModelOutputWithPooling(ModelOutput):
    """last_hidden_state [B, S, d]; pooler_output [B, d]; hidden_states, layers + 1 of [B, S, d]."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class LongformerMaskedLMOutput(ModelOutput):
    """loss []; logits [B, S, V]; hidden_states, layers + 1 of [B, S, d]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class LongformerSequenceClassifierOutput(ModelOutput):
    """loss []; logits [B, C]; hidden_states, layers + 1 of [B, S, d]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class LongformerTokenClassifierOutput(ModelOutput):
    """loss []; logits [B, S, C]; hidden_states, layers + 1 of [B, S, d]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class LongformerMultipleChoiceModelOutput(ModelOutput):
    """loss []; logits [B, choices]; hidden_states, layers + 1 of [B * choices, S, d]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class LongformerQuestionAnsweringModelOutput(ModelOutput):
    """loss []; start_logits, end_logits [B, S]; hidden_states, layers + 1 of [B, S, d]."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
