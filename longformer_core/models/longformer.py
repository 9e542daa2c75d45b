"""Longformer: an encoder with window and global attention, and its published heads.

Module and parameter names are the published ones. The forward methods take padded batches, as
published code calls them; inside all documents lie packed, and padding costs nothing.
Shape letters: B documents, S slots of the padded batch, T packed tokens, d hidden size.
Source: Longformer, arXiv:2004.05150; layers as in RoBERTa, arXiv:1907.11692.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from longformer_core.config import LongformerConfig
from longformer_core.encoding.model import HeadKind
from longformer_core.errors import ShapeError
from longformer_core.layout import Layout
from longformer_core.models.global_attention_mask import (
    mark_choice,
    mark_first_token,
    mark_question,
)
from longformer_core.models.layers import check_ids, check_packed_ids
from longformer_core.models.longformer_layers import (
    LongformerEmbeddings,
    LongformerEncoder,
    LongformerPooler,
)
from longformer_core.models.losses import classification_loss, span_loss, token_logits
from longformer_core.models.outputs import (
    LongformerBaseModelOutputWithPooling,
    LongformerMaskedLMOutput,
    LongformerMultipleChoiceModelOutput,
    LongformerQuestionAnsweringModelOutput,
    LongformerSequenceClassifierOutput,
    LongformerTokenClassifierOutput,
)
from longformer_core.models.packing import padded_batch
from longformer_core.models.pretrained import PretrainedModel
from longformer_core.models.self_attention import attention_maps
from longformer_core.ops.dropout import dropout


class LongformerPreTrainedModel(PretrainedModel[LongformerConfig]):
    """A Longformer that lives in a directory."""

    config_class = LongformerConfig
    head_kind: ClassVar[HeadKind | None] = None

    @property
    def base(self) -> "LongformerModel":
        """Return the model without its head."""
        model = getattr(self, "longformer", self)
        assert isinstance(model, LongformerModel)
        return model

    @property
    def max_source_tokens(self) -> int:
        """Return how long a document may be."""
        return self.config.max_length

    def default_global_mask(self, tokens: Tensor) -> Tensor:
        """Return the mask [B, S] that `forward` takes when it is given none.

        Shapes: tokens [B, S] ids, or where the mask does not depend on them [B, S, d] embeddings.
        """
        return torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)

    def encode(
        self, input_ids: Tensor, layout: Layout, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return the states [T, d] of packed documents.

        Shapes: input_ids, token_type_ids [T].
        Raises: ShapeError when ids and layout differ or an id is outside its table; TooLongError
            for a document with more tokens than positions.
        """
        check_packed_ids(input_ids, layout, self.config.vocab_size)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        check_ids("token_type_ids", token_type_ids, self.config.type_vocab_size)
        embeddings = self.base.embeddings
        positions = embeddings.count_packed_positions(input_ids, layout)
        words = embeddings.word_embeddings(input_ids)
        states: Tensor = self.base.encoder(embeddings(words, positions, token_type_ids), layout)
        return states

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of token embeddings."""
        return self.base.embeddings.word_embeddings

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        """Use another table of token embeddings; what is tied to it follows."""
        self.base.embeddings.word_embeddings = embedding
        self.tie_weights()


class LongformerModel(LongformerPreTrainedModel):
    """Embeddings, encoder and pooler, without a head."""

    def __init__(self, config: LongformerConfig, add_pooling_layer: bool = True) -> None:
        """Make the model with weights drawn from torch's global generator."""
        super().__init__(config)
        self.embeddings = LongformerEmbeddings(config)
        self.encoder = LongformerEncoder(config)
        self.pooler = LongformerPooler(config) if add_pooling_layer else None
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LongformerBaseModelOutputWithPooling:
        """Return the states of a padded batch; see `padded_batch` for the masks.

        Attention probabilities are those before dropout, without gradients.
        Shapes: ids, masks, types and positions [B, S]; inputs_embeds [B, S, d].
        Raises: ShapeError unless exactly one of ids and embeddings is given, and when shapes or
            ids do not fit; TooLongError for a document with more tokens than positions.
        """
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ShapeError("give either input_ids or inputs_embeds, and only one of them")
        slots = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        if position_ids is None:
            position_ids = self.embeddings.count_positions(input_ids, slots)
        position_ids = position_ids.expand(tokens.shape[:2])
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(slots)
        check_ids("position_ids", position_ids, self.config.max_position_embeddings)
        check_ids("token_type_ids", token_type_ids, self.config.type_vocab_size)
        if input_ids is not None:
            check_ids("input_ids", input_ids, self.config.vocab_size)
        # Of embeddings every slot may be another.
        first = input_ids if input_ids is not None else torch.arange(slots.numel()).view_as(slots)
        batch = padded_batch(
            [first.to(slots.device), position_ids, token_type_ids],
            attention_mask,
            global_attention_mask,
        )
        if inputs_embeds is None:
            words = self.embeddings.word_embeddings(batch.pack(first))
        else:
            words = batch.pack(inputs_embeds)
        states = self.embeddings(words, batch.pack(position_ids), batch.pack(token_type_ids))
        every: list[Tensor] | None = [] if output_attentions or output_hidden_states else None
        last = batch.unpack(self.encoder(states, batch.layout, every))
        output = LongformerBaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=None if self.pooler is None else self.pooler(last[:, 0]),
        )
        if output_hidden_states and every is not None:
            output.hidden_states = tuple(map(batch.unpack, every))
        if output_attentions and every is not None:
            local, from_global = attention_maps(self.encoder, every, batch.layout)
            output.attentions = batch.unpack_maps(local)
            output.global_attentions = batch.unpack_maps(from_global)
        return output


class LongformerLMHead(nn.Module):
    """States to logits over the vocabulary, by the word embeddings when tied."""

    def __init__(self, config: LongformerConfig) -> None:
        """Make the head; its bias has two published names."""
        super().__init__()
        d = config.hidden_size
        self.dense = nn.Linear(d, d)
        self.layer_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(d, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., V]."""
        out: Tensor = self.decoder(self.layer_norm(functional.gelu(self.dense(states))))
        return out


class LongformerForMaskedLM(LongformerPreTrainedModel):
    """Guess masked tokens."""

    head_kind = "masked"

    def __init__(self, config: LongformerConfig) -> None:
        """Make the model with weights drawn from torch's global generator."""
        super().__init__(config)
        self.longformer = LongformerModel(config, add_pooling_layer=False)
        self.lm_head = LongformerLMHead(config)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self) -> None:
        """Let embeddings and output projection share their weight again, if the config ties."""
        if self.config.tie_word_embeddings:
            self.lm_head.decoder.weight = self.longformer.embeddings.word_embeddings.weight

    def head_logits(self, states: Tensor) -> Tensor:
        """Return [..., V] of tokens' states [..., d]."""
        out: Tensor = self.lm_head(states)
        return out

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LongformerMaskedLMOutput:
        """Return logits [B, S, V], and the loss over labels [B, S] other than -100.

        The other arguments are those of `LongformerModel.forward`.
        Raises: as there; ShapeError for a label where `attention_mask` is 0.
        """
        base = self.longformer(
            input_ids,
            attention_mask,
            global_attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
        )
        states = base.last_hidden_state
        logits, loss = token_logits(self.head_logits, states, labels, attention_mask)
        return LongformerMaskedLMOutput(loss, logits, **base.passed_on())


class LongformerClassificationHead(nn.Module):
    """The first token's state to logits."""

    def __init__(self, config: LongformerConfig) -> None:
        """Make the two projections."""
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = config.hidden_dropout_prob
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, states: Tensor) -> Tensor:
        """Return [B, labels] of the first tokens' states [B, d]."""
        inner = torch.tanh(self.dense(dropout(states, self.dropout, self.training)))
        out: Tensor = self.out_proj(dropout(inner, self.dropout, self.training))
        return out


class LongformerForSequenceClassification(LongformerPreTrainedModel):
    """Classify documents, or score them when `num_labels` is 1."""

    head_kind = "first"

    def __init__(self, config: LongformerConfig) -> None:
        """Make the model with weights drawn from torch's global generator."""
        super().__init__(config)
        self.longformer = LongformerModel(config, add_pooling_layer=False)
        self.classifier = LongformerClassificationHead(config)
        self.init_weights()

    def default_global_mask(self, tokens: Tensor) -> Tensor:
        """Make the first token global."""
        return mark_first_token(tokens)

    def head_logits(self, states: Tensor) -> Tensor:
        """Return [B, labels] of the first tokens' states [B, d]."""
        out: Tensor = self.classifier(states)
        return out

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LongformerSequenceClassifierOutput:
        """Return logits [B, labels]; without a global mask the first token is global.

        Shapes: labels [B] of classes or values, or [B, labels] of 0.0 and 1.0.
        """
        if global_attention_mask is None:
            tokens = inputs_embeds if input_ids is None else input_ids
            global_attention_mask = None if tokens is None else self.default_global_mask(tokens)
        base = self.longformer(
            input_ids,
            attention_mask,
            global_attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
        )
        logits = self.head_logits(base.last_hidden_state[:, 0])
        loss = None if labels is None else classification_loss(self.config, logits, labels)
        return LongformerSequenceClassifierOutput(loss, logits, **base.passed_on())


class LongformerForTokenClassification(LongformerPreTrainedModel):
    """Classify every token."""

    head_kind = "tokens"

    def __init__(self, config: LongformerConfig) -> None:
        """Make the model with weights drawn from torch's global generator."""
        super().__init__(config)
        self.longformer = LongformerModel(config, add_pooling_layer=False)
        self.dropout = config.hidden_dropout_prob
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights()

    def head_logits(self, states: Tensor) -> Tensor:
        """Return [..., labels] of tokens' states [..., d]."""
        out: Tensor = self.classifier(states)
        return out

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LongformerTokenClassifierOutput:
        """Return logits [B, S, labels], and the loss over labels [B, S] other than -100.

        Raises: as `LongformerModel.forward`; ShapeError for a label where `attention_mask` is 0.
        """
        base = self.longformer(
            input_ids,
            attention_mask,
            global_attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
        )
        states = dropout(base.last_hidden_state, self.dropout, self.training)
        logits, loss = token_logits(self.head_logits, states, labels, attention_mask)
        return LongformerTokenClassifierOutput(loss, logits, **base.passed_on())


class LongformerForQuestionAnswering(LongformerPreTrainedModel):
    """Find the span of a document that answers a question."""

    head_kind = "span"

    def __init__(self, config: LongformerConfig) -> None:
        """Make the model with weights drawn from torch's global generator."""
        super().__init__(config)
        self.longformer = LongformerModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.init_weights()

    def default_global_mask(self, tokens: Tensor) -> Tensor:
        """Make the question global: what stands before the first `</s>` of ids [B, S]."""
        return mark_question(tokens, self.config.sep_token_id)

    def head_logits(self, states: Tensor) -> Tensor:
        """Return [..., 2], that a span starts or ends here, of tokens' states [..., d]."""
        out: Tensor = self.qa_outputs(states)
        return out

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LongformerQuestionAnsweringModelOutput:
        """Return start and end logits [B, S]; without a global mask the question is global.

        The question is what stands before the first `</s>`.
        Shapes: start_positions, end_positions [B]; a position outside the document is ignored.
        Raises: ShapeError when no global mask is given and a row has no `</s>`.
        """
        if global_attention_mask is None and input_ids is not None:
            global_attention_mask = self.default_global_mask(input_ids)
        base = self.longformer(
            input_ids,
            attention_mask,
            global_attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
        )
        start, end = self.head_logits(base.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (span_loss(start, start_positions) + span_loss(end, end_positions)) / 2
        return LongformerQuestionAnsweringModelOutput(
            loss, start.contiguous(), end.contiguous(), **base.passed_on()
        )


class LongformerForMultipleChoice(LongformerPreTrainedModel):
    """Choose one of several continuations."""

    head_kind = "first"

    def __init__(self, config: LongformerConfig) -> None:
        """Make the model with weights drawn from torch's global generator."""
        super().__init__(config)
        self.longformer = LongformerModel(config)
        self.dropout = config.hidden_dropout_prob
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.init_weights()

    def default_global_mask(self, tokens: Tensor) -> Tensor:
        """Make the choice's own text global: what stands behind the first `</s>` of ids [B, S]."""
        return mark_choice(tokens, self.config.sep_token_id)

    def head_logits(self, states: Tensor) -> Tensor:
        """Return the score [B, 1] of each choice by its first token's state [B, d]."""
        assert self.longformer.pooler is not None
        return self._score(self.longformer.pooler(states))

    def _score(self, pooled: Tensor) -> Tensor:
        out: Tensor = self.classifier(dropout(pooled, self.dropout, self.training))
        return out

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LongformerMultipleChoiceModelOutput:
        """Return logits [B, choices]; without a global mask the choice's own text is global.

        Shapes: ids and masks [B, choices, S]; inputs_embeds [B, choices, S, d]; labels [B].
        """
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None:
            raise ShapeError("give either input_ids or inputs_embeds, and only one of them")
        choices = tokens.shape[1]
        if global_attention_mask is None and input_ids is not None:
            marks = self.default_global_mask(input_ids.flatten(0, 1))
            global_attention_mask = marks.view_as(input_ids)
        flat = [
            None if given is None else given.flatten(0, 1)
            for given in (
                input_ids,
                attention_mask,
                global_attention_mask,
                token_type_ids,
                position_ids,
                inputs_embeds,
            )
        ]
        base = self.longformer(
            *flat, output_attentions=output_attentions, output_hidden_states=output_hidden_states
        )
        logits = self._score(base.pooler_output).view(-1, choices)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return LongformerMultipleChoiceModelOutput(loss, logits, **base.passed_on())
