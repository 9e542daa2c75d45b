"""LED without a head, and the model that writes text about long documents.

The forward methods take padded batches, as published code calls them; inside, the source lies
packed. Generation takes packed batches from the start: `encode`, `source`, `decode_step`.
Shape letters: B documents, S source slots and N target tokens of a padded batch, T packed tokens,
R decoder rows, V vocabulary, d hidden size.
Source: Longformer, arXiv:2004.05150, section 7; layers as in BART, arXiv:1910.13461.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from longformer_core.attention.cross_attention import CrossAttentionCache
from longformer_core.attention.global_attention import Form
from longformer_core.config import LEDConfig
from longformer_core.config.base import read_json
from longformer_core.encoding.model import HeadKind
from longformer_core.errors import ShapeError, TooLongError
from longformer_core.generation.config import GENERATION_FILE
from longformer_core.generation.kv_cache import BeamKVCache
from longformer_core.hub import resolve
from longformer_core.layout import Layout
from longformer_core.models.generate import GenerationMixin
from longformer_core.models.layers import check_ids, check_lengths, check_packed_ids
from longformer_core.models.led_layers import (
    DecoderMaps,
    LEDDecoder,
    LEDEncoder,
)
from longformer_core.models.losses import token_logits
from longformer_core.models.outputs import (
    LEDEncoderBaseModelOutput,
    LEDSeq2SeqLMOutput,
    LEDSeq2SeqModelOutput,
    ModelOutput,
)
from longformer_core.models.packing import one_of, padded_batch, shift_tokens_right
from longformer_core.models.past_key_values import DecoderPast
from longformer_core.models.pretrained import PretrainedModel
from longformer_core.models.self_attention import attention_maps
from longformer_core.ops.linear import Linear

EncoderOutputs = LEDEncoderBaseModelOutput | tuple[Any, ...]


class LEDPreTrainedModel(PretrainedModel[LEDConfig]):
    """An LED that lives in a directory."""

    config_class = LEDConfig
    head_kind: ClassVar[HeadKind | None] = None

    @property
    def base(self) -> "LEDModel":
        """Return the model without its head."""
        model = getattr(self, "led", self)
        assert isinstance(model, LEDModel)
        return model

    @property
    def max_source_tokens(self) -> int:
        """Return how long a document may be."""
        return self.config.max_encoder_position_embeddings

    def default_global_mask(self, tokens: Tensor) -> Tensor:
        """Return the mask [B, S] that `forward` takes when it is given none: zeros.

        Shapes: tokens [B, S] ids.
        """
        return torch.zeros_like(tokens)

    def encode(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """Return the encoder's states [T, d] of packed documents [T].

        Raises: ShapeError when ids and layout differ or an id is outside the vocabulary;
            TooLongError for a document with more tokens than the encoder has positions.
        """
        check_packed_ids(input_ids, layout, self.config.vocab_size)
        check_lengths(layout, self.config.max_encoder_position_embeddings)
        encoder = self.base.encoder
        states: Tensor = encoder(encoder.embed_tokens(input_ids), layout.positions, layout)
        return states

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of token embeddings that encoder and decoder share."""
        return self.base.shared

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        """Use another table of token embeddings; what is tied to it follows."""
        self.base.shared = embedding
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let encoder and decoder use the shared embeddings again, if the config ties them."""
        if self.config.tie_word_embeddings:
            base = self.base
            base.encoder.embed_tokens = base.decoder.embed_tokens = base.shared

    def get_encoder(self) -> LEDEncoder:
        """Return the encoder, on packed batches; `LEDModel.encode_padded` takes padded ones."""
        return self.base.encoder

    def get_decoder(self) -> LEDDecoder:
        """Return the decoder."""
        return self.base.decoder


class LEDModel(LEDPreTrainedModel):
    """Encoder and decoder over one vocabulary, without a head."""

    def __init__(self, config: LEDConfig) -> None:
        """Make both halves; they share the token embedding when the config ties embeddings."""
        super().__init__(config)

        def embedding() -> nn.Embedding:
            return nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)

        self.shared = embedding()
        tied = config.tie_word_embeddings
        self.encoder = LEDEncoder(config, self.shared if tied else embedding())
        self.decoder = LEDDecoder(config, self.shared if tied else embedding())
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: EncoderOutputs | None = None,
        global_attention_mask: Tensor | None = None,
        past_key_values: DecoderPast | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LEDSeq2SeqModelOutput:
        """Return the decoder's states of a padded batch.

        Without ids or embeddings for it the decoder reads `input_ids` moved one place on.
        `attention_mask` says what encoder and decoder see of the source; a slot that is masked by
        a negative `global_attention_mask` alone is hidden from the encoder only. Left padding of
        the source changes nothing. `past_key_values` holds targets' earlier tokens and their
        source; without `encoder_outputs` the source is not read again.
        Shapes: ids and masks [B, S] and [B, N], `decoder_attention_mask` [B, held + N];
            embeddings [B, S, d] and [B, N, d].
        Raises: ShapeError for inputs that do not fit one another; TooLongError for more tokens than
            positions.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shifted_source(input_ids)
        encoded: EncoderOutputs = encoder_outputs or LEDEncoderBaseModelOutput()
        if encoder_outputs is None and past_key_values is None:
            encoded = self.encode_padded(
                input_ids,
                attention_mask,
                global_attention_mask,
                inputs_embeds,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
            )
        if not isinstance(encoded, ModelOutput):
            encoded = LEDEncoderBaseModelOutput(*encoded)
        return self._decode(
            encoded,
            attention_mask,
            one_of(decoder_input_ids, decoder_inputs_embeds, "decoder_input"),
            decoder_attention_mask,
            past_key_values,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )

    def encode_padded(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LEDEncoderBaseModelOutput:
        """Return the encoder's states of a padded batch; see `forward`."""
        tokens = one_of(input_ids, inputs_embeds, "input")
        if input_ids is not None:
            check_ids("input_ids", input_ids, self.config.vocab_size)
        positions = self._source_positions(tokens, attention_mask)
        slots = torch.arange(positions.numel(), device=tokens.device).view_as(positions)
        is_seen = torch.ones_like(slots) if attention_mask is None else attention_mask.ne(0)
        # Nothing looks at padding, so all of it may be of one kind.
        first = (slots if input_ids is None else input_ids) * is_seen
        batch = padded_batch([first, positions * is_seen], attention_mask, global_attention_mask)
        words = batch.pack(tokens)
        if input_ids is not None:
            words = self.encoder.embed_tokens(words)
        every: list[Tensor] | None = [] if output_attentions or output_hidden_states else None
        last = self.encoder(words, batch.pack(positions), batch.layout, every)
        output = LEDEncoderBaseModelOutput(batch.unpack(last))
        if output_hidden_states and every is not None:
            output.hidden_states = tuple(map(batch.unpack, every))
        if output_attentions and every is not None:
            local, from_global = attention_maps(self.encoder, every, batch.layout)
            output.attentions = batch.unpack_maps(local)
            output.global_attentions = batch.unpack_maps(from_global)
        return output

    def _source_positions(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return positions [B, S], counted from each document's first slot that is not padding."""
        batch_size, num_slots = tokens.shape[:2]
        count = torch.arange(num_slots, device=tokens.device).expand(batch_size, num_slots)
        if attention_mask is not None and num_slots:
            if attention_mask.shape != count.shape:
                raise ShapeError(
                    f"attention_mask has shape {list(attention_mask.shape)}; the tokens have "
                    f"{list(count.shape)}"
                )
            is_seen = attention_mask.ne(0)
            count = ((count - is_seen.int().argmax(1, keepdim=True)) * is_seen).clamp(min=0)
        limit = self.config.max_encoder_position_embeddings
        longest = int(count.max()) + 1 if count.numel() else 0
        if longest > limit:
            raise TooLongError(
                f"a document has {longest} tokens but the encoder has {limit} positions; shorten "
                "the document or choose a model with more positions"
            )
        return count

    def _shifted_source(self, input_ids: Tensor | None) -> Tensor:
        if input_ids is None:
            raise ShapeError(
                "there is nothing for the decoder to read; give decoder_input_ids, "
                "decoder_inputs_embeds or labels beside inputs_embeds or encoder_outputs"
            )
        limit = self.config.max_decoder_position_embeddings
        if input_ids.shape[1] > limit:
            raise TooLongError(
                f"without decoder_input_ids the decoder reads the source, whose "
                f"{input_ids.shape[1]} tokens are more than its {limit} positions (the encoder has "
                f"{self.config.max_encoder_position_embeddings}); give decoder_input_ids"
            )
        return shift_tokens_right(
            input_ids, self.config.pad_token_id, self.config.decoder_start_token_id
        )

    def _decode(
        self,
        encoded: LEDEncoderBaseModelOutput,
        attention_mask: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None,
        past: DecoderPast | None,
        *,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> LEDSeq2SeqModelOutput:
        batch_size, num_new = tokens.shape[:2]
        keep = use_cache and not (self.training and self.is_gradient_checkpointing)
        encoder_states = encoded.last_hidden_state
        if past is None:
            assert encoder_states is not None
            # Whoever keeps the past may come back with any number of tokens.
            num_rows = None if keep else num_new
            source = self._source_of(encoder_states, attention_mask, num_rows)
            past = DecoderPast(source, batch_size)
        limit = self.config.max_decoder_position_embeddings
        if past.length + num_new > limit:
            raise TooLongError(
                f"targets of {past.length + num_new} tokens but the decoder has {limit} positions; "
                "ask for shorter outputs"
            )
        if tokens.dim() == 2:
            check_ids("decoder_input_ids", tokens, self.config.vocab_size)
            tokens = self.decoder.embed_tokens(tokens)
        start = past.length
        dropout_p = self.config.attention_dropout if self.training else 0.0
        view = past.view(num_new, mask, keep=keep, dropout_p=dropout_p)
        positions = torch.arange(start, start + num_new, device=tokens.device).repeat(batch_size)
        every: list[Tensor] | None = [] if output_hidden_states else None
        maps = None
        if output_attentions and encoder_states is not None:
            is_visible = torch.ones(encoder_states.shape[:2], dtype=torch.bool)
            if attention_mask is not None:
                is_visible = attention_mask.ne(0)
            maps = DecoderMaps(encoder_states, is_visible.to(tokens.device))
            view.maps = maps.own
        last = self.decoder(
            tokens.flatten(0, 1), positions, view, past.source, num_new, every, maps
        )

        def padded(states: Tensor) -> Tensor:
            return states.view(batch_size, num_new, -1)

        return LEDSeq2SeqModelOutput(
            last_hidden_state=padded(last),
            past_key_values=past if keep else None,
            decoder_hidden_states=None if every is None else tuple(map(padded, every)),
            decoder_attentions=None if maps is None else tuple(maps.own),
            cross_attentions=None if maps is None else tuple(maps.cross),
            encoder_last_hidden_state=encoder_states,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            encoder_global_attentions=encoded.global_attentions,
        )

    def _source_of(
        self, states: Tensor, attention_mask: Tensor | None, num_rows: int | None
    ) -> CrossAttentionCache:
        """Pack what the decoder may attend to of padded states [B, S, d]."""
        batch_size, num_slots = states.shape[:2]
        lengths = [num_slots] * batch_size
        packed = states.flatten(0, 1)
        if attention_mask is not None:
            is_visible = attention_mask.to(states.device).ne(0)
            lengths, packed = is_visible.sum(1).tolist(), states[is_visible]
        layout = Layout.from_lengths(lengths, device=states.device)
        return self.decoder.source(packed, layout, num_rows=num_rows)


class LEDForConditionalGeneration(GenerationMixin, LEDPreTrainedModel):
    """Write a text about a long document: encode it once, then decode token by token.

    `forward` is the published padded interface, for training and scoring, and `generate` that for
    writing. The engine below it runs `encode` and `source` once per packed batch; `new_cache` and
    `decode_step` drive any search.
    """

    final_logits_bias: Tensor
    _optional_weights = ("final_logits_bias",)

    def __init__(self, config: LEDConfig) -> None:
        """Make the model with weights drawn from torch's global generator."""
        super().__init__(config)
        self.led = LEDModel(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False, by_gemm=False)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.tie_weights()
        self.init_weights()

    @classmethod
    def from_pretrained(cls, directory: str | Path, **options: Any) -> Self:
        """Load weights and generation options; see `PretrainedModel.from_pretrained`."""
        model = super().from_pretrained(directory, **options)
        path = resolve(directory, revision=options.get("revision")) / GENERATION_FILE
        if path.exists():
            model.generation_options = read_json(path)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config, weights and generation options, readable by transformers as well."""
        super().save_pretrained(directory)
        self.save_generation_options(directory)

    def tie_weights(self) -> None:
        """Let embeddings and output projection share their weight again, if the config ties."""
        super().tie_weights()
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.led.shared.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: EncoderOutputs | None = None,
        global_attention_mask: Tensor | None = None,
        past_key_values: DecoderPast | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> LEDSeq2SeqLMOutput:
        """Return logits [B, N, V], and the loss over labels [B, N] other than -100.

        Given labels, the decoder reads them moved one place on unless it is given something else,
        and nothing is cached. The other arguments are those of `LEDModel.forward`.
        Raises: as `LEDModel.forward`; ShapeError for a label where `decoder_attention_mask` is 0.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = shift_tokens_right(
                    labels, self.config.pad_token_id, self.config.decoder_start_token_id
                )
        output: LEDSeq2SeqModelOutput = self.led(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            global_attention_mask,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        states = output.last_hidden_state
        assert states is not None
        logits, loss = token_logits(self._logits, states, labels, decoder_attention_mask)
        return LEDSeq2SeqLMOutput(loss=loss, logits=logits, **output.passed_on())

    def source(
        self,
        states: Tensor,
        layout: Layout,
        *,
        num_rows: int | Sequence[int] | None = None,
        form: Form = "auto",
    ) -> CrossAttentionCache:
        """Prepare what decoding needs of the encoded documents, each once whatever its beams.

        num_rows: how many rows will read a document in all, beams times steps; for few of them the
            encoder's states serve as they are. One number for all or one for each, None for many.
        form: "projected" or "absorbed" instead of the cheaper one; see `CrossAttentionCache`.
        """
        return self.led.decoder.source(states, layout, num_rows=num_rows, form=form)

    def new_cache(
        self,
        num_documents: int,
        rows_per_document: int = 1,
        *,
        max_steps: Sequence[int] | None = None,
        is_speculative: bool = False,
        has_fixed_shapes: bool = False,
    ) -> BeamKVCache:
        """Return an empty cache; memory grows with the tokens written.

        max_steps: of each document; None for as many as the decoder has positions.
        is_speculative: a document's rows are consecutive tokens of one text, not beams.
        has_fixed_shapes: steps may be recorded and replayed.
        """
        heads = self.config.decoder_attention_heads
        cache = BeamKVCache(
            self.config.decoder_layers,
            rows_per_document,
            heads,
            self.config.d_model // heads,
            is_speculative=is_speculative,
            has_fixed_shapes=has_fixed_shapes,
            dtype=self.dtype,
            device=self.device,
        )
        limit = self.config.max_decoder_position_embeddings
        cache.add([limit] * num_documents if max_steps is None else max_steps)
        return cache

    def decode_step(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: BeamKVCache,
        source: CrossAttentionCache,
    ) -> Tensor:
        """Add one token to each row and return the logits [R, V] of its next one, in float32.

        Shapes: token_ids, positions [R]; row i is of document i // cache.rows_per_document. The
            positions, any, are checked where they are on the CPU, so that nothing waits for the
            device.
        Raises: ShapeError when rows, cache and source do not fit together; TooLongError for a
            position that the decoder does not have.
        """
        if len(token_ids) != cache.num_rows:
            raise ShapeError(f"{len(token_ids)} rows step but the cache holds {cache.num_rows}")
        limit = self.config.max_decoder_position_embeddings
        if positions.is_cpu and len(positions) and int(positions.max()) >= limit:
            raise TooLongError(
                f"a row is at position {int(positions.max())} but the decoder has {limit}, counted "
                "from 0; ask for shorter outputs"
            )
        cache.begin_step()
        decoder = self.led.decoder
        words = decoder.embed_tokens(token_ids)
        positions = positions.to(token_ids.device)
        states = decoder(words, positions, cache, source, cache.rows_per_document)
        return self._logits(states).float()

    def _logits(self, states: Tensor) -> Tensor:
        """Return [..., V] of the decoder's states [..., d]."""
        logits: Tensor = self.lm_head(states) + self.final_logits_bias
        return logits
