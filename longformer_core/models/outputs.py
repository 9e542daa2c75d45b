"""What the models of the published interface return.

Shape letters: B documents, S tokens of the longest, N tokens of the longest target, d hidden size,
H heads, V vocabulary, C labels, x most global tokens of a document, w window of a layer.
`hidden_states` are layers + 1 of [B, S, d], `attentions` one of [B, H, S, x + w + 1] per layer (to
the global tokens, then to the window around the token) and `global_attentions` one of [B, H, S, x]
per layer (from the global tokens); of LED's decoder `decoder_attentions` are [B, H, N, N] and
`cross_attentions` [B, H, N, S] per layer. A field that was not asked for is None.
Source: transformers 5.23, names and order of the fields.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from longformer_core.models.past_key_values import DecoderPast


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

    def passed_on(self) -> dict[str, Any]:
        """Return what a head adds to its own output: all fields but the states it has read."""
        read = ("last_hidden_state", "pooler_output")
        return {name: value for name, value in self.items() if name not in read}

    def __getitem__(self, key: str | int | slice) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.items())


@dataclass
class LongformerBaseModelOutput(ModelOutput):
    """last_hidden_state [B, S, d]."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LongformerBaseModelOutputWithPooling(ModelOutput):
    """last_hidden_state [B, S, d]; pooler_output [B, d]."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LongformerMaskedLMOutput(ModelOutput):
    """loss []; logits [B, S, V]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LongformerCausalLMOutput(ModelOutput):
    """loss []; logits [B, S, V]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class LongformerSequenceClassifierOutput(ModelOutput):
    """loss []; logits [B, C]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LongformerTokenClassifierOutput(ModelOutput):
    """loss []; logits [B, S, C]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LongformerMultipleChoiceModelOutput(ModelOutput):
    """loss []; logits [B, choices]; the others of B * choices documents."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LongformerQuestionAnsweringModelOutput(ModelOutput):
    """loss []; start_logits, end_logits [B, S]."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LEDEncoderBaseModelOutput(ModelOutput):
    """last_hidden_state [B, S, d]."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    global_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LEDSeq2SeqModelOutput(ModelOutput):
    """last_hidden_state [B, N, d] of the decoder."""

    last_hidden_state: Tensor | None = None
    past_key_values: DecoderPast | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_global_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LEDSeq2SeqLMOutput(ModelOutput):
    """loss []; logits [B, N, V]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: DecoderPast | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_global_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LEDGenerateOutput(ModelOutput):
    """sequences [B * r, N]; sequences_scores [B * r]; scores, beam_indices [B * r, N - 1].

    N is the longest output with its start token, r the sequences of each document. `scores` has one
    [B * K, V] for each step, K rows of each document: what the options made of the next token's
    scores, -inf from a document's end on. `beam_indices` are the rows that each token was added to,
    -1 from a sequence's end on.
    """

    sequences: Tensor | None = None
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None


@dataclass
class LEDSeq2SeqSequenceClassifierOutput(ModelOutput):
    """loss []; logits [B, C]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: DecoderPast | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_global_attentions: tuple[Tensor, ...] | None = None


@dataclass
class LEDSeq2SeqQuestionAnsweringModelOutput(ModelOutput):
    """loss []; start_logits, end_logits [B, N]."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    past_key_values: DecoderPast | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_global_attentions: tuple[Tensor, ...] | None = None
