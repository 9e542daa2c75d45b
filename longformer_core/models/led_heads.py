"""The published heads of LED that write no text: classify documents, and find spans.

Shape letters: B documents, S source slots and N target tokens of a padded batch, d hidden size,
C labels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from longformer_core.attention.window import window_attention
from longformer_core.config import LEDConfig
from longformer_core.errors import ShapeError
from longformer_core.layout import Layout
from longformer_core.models.led import EncoderOutputs, LEDModel, LEDPreTrainedModel
from longformer_core.models.led_layers import LEDDecoder, LEDDecoderAttention
from longformer_core.models.losses import classification_loss, span_loss
from longformer_core.models.outputs import (
    LEDSeq2SeqModelOutput,
    LEDSeq2SeqQuestionAnsweringModelOutput,
    LEDSeq2SeqSequenceClassifierOutput,
)
from longformer_core.ops.dropout import dropout


class LEDClassificationHead(nn.Module):
    """One state of each document to logits."""

    def __init__(self, config: LEDConfig) -> None:
        """Make the two projections."""
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dropout = config.classifier_dropout
        self.out_proj = nn.Linear(config.d_model, config.num_labels)

    def forward(self, states: Tensor) -> Tensor:
        """Return [B, C] of [B, d]."""
        inner = torch.tanh(self.dense(dropout(states, self.dropout, self.training)))
        out: Tensor = self.out_proj(dropout(inner, self.dropout, self.training))
        return out


class _OwnTokens:
    """The causal attention of packed targets of any lengths, each to itself."""

    def __init__(self, layout: Layout) -> None:
        self._layout = Layout.from_lengths(layout.lengths, device=layout.device)
        self._radius = max(layout.lengths, default=1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002 - all alike
        return window_attention(q, k, v, self._layout, self._radius, causal=True).flatten(1)


class _OwnSources:
    """The attention of packed targets of any lengths to the documents of one packed batch.

    Keys and values are made where they are read, for each layer reads a document only once.
    """

    def __init__(self, decoder: LEDDecoder, states: Tensor, layout: Layout) -> None:
        self._decoder = decoder
        self._states = states
        self._lengths = list(layout.lengths)
        if layout.is_visible is not None:
            self._states = states[layout.is_visible]
            parts = torch.split(layout.is_visible, self._lengths)
            self._lengths = [int(flags.sum()) for flags in parts]

    def attend(
        self, layer: int, q: Tensor, rows: Sequence[int], /, *, dropout_p: float = 0.0
    ) -> Tensor:
        """Return [R, H * D] of q [R, H, D], `rows` of each document; zeros where all is hidden."""
        module = self._decoder.layers[layer].encoder_attn
        assert isinstance(module, LEDDecoderAttention)
        keys = module.heads(module.k_proj, self._states)
        values = module.heads(module.v_proj, self._states)
        documents = zip(
            torch.split(q, list(rows)),
            torch.split(keys, self._lengths),
            torch.split(values, self._lengths),
            strict=True,
        )
        outputs = []
        for document in documents:
            query, key, value = (x.transpose(0, 1) for x in document)
            out = torch.zeros_like(query)
            if key.shape[1]:
                out = scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)
            outputs.append(out.transpose(0, 1))
        return torch.cat(outputs).flatten(1)


class LEDForReading(LEDPreTrainedModel):
    """A head on the states of a decoder that reads the source once more."""

    led: LEDModel

    @property
    def max_source_tokens(self) -> int:
        """Return how long a document may be: both halves have positions for it."""
        return min(super().max_source_tokens, self.config.max_decoder_position_embeddings)

    def decode_source(self, states: Tensor, layout: Layout, input_ids: Tensor) -> Tensor:
        """Return the decoder's states [T, d] of packed documents that it reads, moved one place on.

        Shapes: states [T, d], the encoder's; input_ids [T]; every document has a token.
        """
        decoder = self.led.decoder
        shifted = input_ids.roll(1)
        shifted[layout.offsets[:-1].long()] = self.config.decoder_start_token_id
        out: Tensor = decoder(
            decoder.embed_tokens(shifted),
            layout.positions,
            _OwnTokens(layout),
            _OwnSources(decoder, states, layout),
            layout.lengths,
        )
        return out


class LEDForSequenceClassification(LEDForReading):
    """Classify documents by the decoder's state at the last `</s>`, or score them."""

    head_kind = "end"

    def __init__(self, config: LEDConfig) -> None:
        """Make the model with weights drawn from torch's global generator."""
        super().__init__(config)
        self.led = LEDModel(config)
        self.classification_head = LEDClassificationHead(config)
        self.init_weights()

    def head_logits(self, states: Tensor) -> Tensor:
        """Return [B, C] of the decoder's states [B, d] at the documents' last `</s>`."""
        out: Tensor = self.classification_head(states)
        return out

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: EncoderOutputs | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LEDSeq2SeqSequenceClassifierOutput:
        """Return logits [B, C].

        The state is the one at the last `</s>` of `input_ids` when the decoder reads the source,
        and otherwise at the last token that `decoder_attention_mask` leaves.
        Shapes: labels [B] of classes or values, or [B, C] of 0.0 and 1.0.
        Raises: as `LEDModel.forward`; ShapeError when a row has no `</s>`.
        """
        output: LEDSeq2SeqModelOutput = self.led(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            global_attention_mask,
            None,
            inputs_embeds,
            decoder_inputs_embeds,
            False if labels is not None else use_cache,
            output_attentions,
            output_hidden_states,
        )
        states = output.last_hidden_state
        assert states is not None
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            assert input_ids is not None
            last = _last(self._is_end(input_ids), "the end token")
        elif decoder_attention_mask is not None:
            last = _last(decoder_attention_mask.ne(0), "a token that decoder_attention_mask leaves")
        else:
            last = torch.full((len(states),), states.shape[1] - 1)
        rows = torch.arange(len(states), device=states.device)
        logits = self.head_logits(states[rows, last.to(states.device)])
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        return LEDSeq2SeqSequenceClassifierOutput(loss=loss, logits=logits, **output.passed_on())

    def _is_end(self, input_ids: Tensor) -> Tensor:
        ends = torch.tensor(self.config.eos_token_ids, device=input_ids.device)
        return torch.isin(input_ids, ends)


def _last(flags: Tensor, what: str) -> Tensor:
    """Return the last position [B] of each row where [B, N] is true."""
    if not bool(flags.any(1).all()):
        raise ShapeError(f"a row does not contain {what}, so there is no state to classify")
    count = torch.arange(flags.shape[1], device=flags.device)
    return (flags * count).amax(1)


class LEDForQuestionAnswering(LEDForReading):
    """Find a span of the text that the decoder reads."""

    head_kind = "span"

    def __init__(self, config: LEDConfig) -> None:
        """Make the model with weights drawn from torch's global generator."""
        super().__init__(config)
        self.led = LEDModel(config)
        self.qa_outputs = nn.Linear(config.d_model, 2)
        self.init_weights()

    def head_logits(self, states: Tensor) -> Tensor:
        """Return [..., 2], that a span starts or ends here, of the decoder's states [..., d]."""
        out: Tensor = self.qa_outputs(states)
        return out

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: EncoderOutputs | None = None,
        global_attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LEDSeq2SeqQuestionAnsweringModelOutput:
        """Return start and end logits [B, N] over the tokens that the decoder reads.

        Shapes: start_positions, end_positions [B]; a position outside the text is ignored.
        Raises: as `LEDModel.forward`.
        """
        asked = start_positions is not None and end_positions is not None
        output: LEDSeq2SeqModelOutput = self.led(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            global_attention_mask,
            None,
            inputs_embeds,
            decoder_inputs_embeds,
            False if asked else use_cache,
            output_attentions,
            output_hidden_states,
        )
        assert output.last_hidden_state is not None
        start, end = self.head_logits(output.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (span_loss(start, start_positions) + span_loss(end, end_positions)) / 2
        return LEDSeq2SeqQuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start.contiguous(),
            end_logits=end.contiguous(),
            **output.passed_on(),
        )
