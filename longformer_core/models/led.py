"""LED: an encoder with window and global attention, and a decoder that reads its states.

Module and parameter names are the published ones, for checkpoints fit without renaming.
Shape letters: B documents, T packed tokens, R decoder rows, H heads, D head dimension, d = H * D,
V vocabulary.
Source: Longformer, arXiv:2004.05150, section 7; layers as in BART, arXiv:1910.13461.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from longformer_core.attention.rows import Source
from longformer_core.config import LEDConfig
from longformer_core.errors import ShapeError, TooLongError
from longformer_core.layout import Layout
from longformer_core.models.base import PretrainedModel, activation, check_ids
from longformer_core.models.cache import DecoderCache
from longformer_core.models.self_attention import LongformerSelfAttention

# Published LED clamps a float16 layer's infinities to this distance from the largest number.
_HALF_MARGIN = 1000


class LEDEncoderAttention(nn.Module):
    """Self-attention and its output projection."""

    def __init__(self, config: LEDConfig, radius: int) -> None:
        """Make one layer's attention that looks `radius` tokens either side."""
        super().__init__()
        self.longformer_self_attn = LongformerSelfAttention(
            config.d_model, config.encoder_attention_heads, radius
        )
        self.output = nn.Linear(config.d_model, config.d_model)

    def forward(self, states: Tensor, layout: Layout) -> Tensor:
        """Return [T, d]."""
        out: Tensor = self.output(self.longformer_self_attn(states, layout))
        return out


class LEDEncoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input and normalised after."""

    def __init__(self, config: LEDConfig, radius: int) -> None:
        """Make one layer that looks `radius` tokens either side."""
        super().__init__()
        self.self_attn = LEDEncoderAttention(config, radius)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = activation(config.activation_function)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, states: Tensor, layout: Layout) -> Tensor:
        """Return the next states [T, d]."""
        states = self.self_attn_layer_norm(states + self.self_attn(states, layout))
        out: Tensor = self.final_layer_norm(states + self.fc2(self.activation(self.fc1(states))))
        if out.dtype == torch.float16:
            # Always, not only when an infinity is present: no document may depend on another, and
            # looking would wait for the device.
            limit = torch.finfo(out.dtype).max - _HALF_MARGIN
            out = out.clamp(-limit, limit)
        return out


class LEDDecoderAttention(nn.Module):
    """The four projections of one decoder attention; cache and source hold what it attends to."""

    def __init__(self, config: LEDConfig) -> None:
        """Make the projections, under BART's names."""
        super().__init__()
        d = config.d_model
        self.num_heads = config.decoder_attention_heads
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.q_proj = nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)

    def heads(self, module: nn.Module, states: Tensor) -> Tensor:
        """Return `module(states)` [R, d] as [R, H, D]."""
        out: Tensor = module(states).unflatten(-1, (self.num_heads, -1))
        return out


class LEDDecoderLayer(nn.Module):
    """Attention to the row's own tokens, attention to the document, feed-forward."""

    def __init__(self, config: LEDConfig) -> None:
        """Make one layer."""
        super().__init__()
        self.self_attn = LEDDecoderAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = LEDDecoderAttention(config)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.activation = activation(config.activation_function)
        self.fc1 = nn.Linear(config.d_model, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def step(
        self, states: Tensor, index: int, cache: DecoderCache, source: Source, rows: int
    ) -> Tensor:
        """Return the next states [R, d] of one new token per row.

        index: this layer's number in cache and source; rows: the rows per document.
        """
        own = self.self_attn
        q, k, v = (own.heads(m, states) for m in (own.q_proj, own.k_proj, own.v_proj))
        out = own.out_proj(cache.attend(index, q, k, v))
        states = self.self_attn_layer_norm(states + out)
        cross = self.encoder_attn
        out = cross.out_proj(source.attend(index, cross.heads(cross.q_proj, states), rows))
        states = self.encoder_attn_layer_norm(states + out)
        out = self.fc2(self.activation(self.fc1(states)))
        last: Tensor = self.final_layer_norm(states + out)
        return last


class LEDEncoder(nn.Module):
    """Token and position embeddings and the encoder layers."""

    def __init__(self, config: LEDConfig, embed_tokens: nn.Embedding) -> None:
        """Make the encoder around a (usually shared) token embedding."""
        super().__init__()
        d = config.d_model
        self.embed_tokens = embed_tokens
        self.embed_positions = nn.Embedding(config.max_encoder_position_embeddings, d)
        self.layers = nn.ModuleList(LEDEncoderLayer(config, radius) for radius in config.radii)
        self.layernorm_embedding = nn.LayerNorm(d)

    def forward(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """Return the states [T, d] of a packed batch."""
        positions = self.embed_positions(layout.positions)
        states: Tensor = self.layernorm_embedding(self.embed_tokens(input_ids) + positions)
        for layer in self.layers:
            states = layer(states, layout)
        return states


class LEDDecoder(nn.Module):
    """Token and position embeddings and the decoder layers."""

    def __init__(self, config: LEDConfig, embed_tokens: nn.Embedding) -> None:
        """Make the decoder around a (usually shared) token embedding."""
        super().__init__()
        d = config.d_model
        self.embed_tokens = embed_tokens
        self.embed_positions = nn.Embedding(config.max_decoder_position_embeddings, d)
        self.layers = nn.ModuleList(LEDDecoderLayer(config) for _ in range(config.decoder_layers))
        self.layernorm_embedding = nn.LayerNorm(d)

    def step(
        self, token_ids: Tensor, lengths: Tensor, cache: DecoderCache, source: Source, rows: int
    ) -> Tensor:
        """Return the last layer's states [R, d] of one new token per row."""
        cache.begin_step(lengths, rows)
        positions = self.embed_positions(lengths.to(token_ids.device))
        states: Tensor = self.layernorm_embedding(self.embed_tokens(token_ids) + positions)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, LEDDecoderLayer)
            states = layer.step(states, index, cache, source, rows)
        return states


class LEDModel(nn.Module):
    """Encoder and decoder over one vocabulary."""

    def __init__(self, config: LEDConfig) -> None:
        """Make both halves; they share the token embedding when the config ties embeddings."""
        super().__init__()

        def embedding() -> nn.Embedding:
            return nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)

        self.shared = embedding()
        tied = config.tie_word_embeddings
        self.encoder = LEDEncoder(config, self.shared if tied else embedding())
        self.decoder = LEDDecoder(config, self.shared if tied else embedding())


class LEDForConditionalGeneration(PretrainedModel[LEDConfig]):
    """Write a text about a long document: encode it once, then decode token by token.

    `encode` and `source` run once per packed batch; `new_cache` and `decode_step` drive any search.
    Dropout is never applied by these methods.
    """

    final_logits_bias: Tensor
    config_class = LEDConfig
    _optional_weights = ("final_logits_bias",)

    def __init__(self, config: LEDConfig) -> None:
        """Make the model with weights drawn from torch's global generator."""
        super().__init__(config)
        self.led = LEDModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        if config.tie_word_embeddings:
            self.lm_head.weight = self.led.shared.weight
        self.init_weights()

    def encode(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """Return the encoder's states [T, d] of packed documents [T].

        Raises: ShapeError when ids and layout differ or an id is outside the vocabulary;
            TooLongError for a document with more tokens than the encoder has positions.
        """
        if input_ids.shape != (layout.num_tokens,):
            raise ShapeError(
                f"input_ids have shape {list(input_ids.shape)} but the layout describes "
                f"{layout.num_tokens} packed tokens; give one id per token, documents end to end"
            )
        limit = self.config.max_encoder_position_embeddings
        for document, (start, end) in enumerate(pairwise(layout.cu_seqlens)):
            if end - start > limit:
                raise TooLongError(
                    f"document {document} has {end - start} tokens but the encoder has {limit} "
                    "positions; shorten the document or choose a model with more positions"
                )
        check_ids("input_ids", input_ids, self.config.vocab_size)
        states: Tensor = self.led.encoder(input_ids, layout)
        return states

    def source(self, states: Tensor, layout: Layout) -> Source:
        """Prepare what decoding needs of the encoded documents, each once whatever its beams."""
        layers = [layer for layer in self.led.decoder.layers if isinstance(layer, LEDDecoderLayer)]
        projections = [(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in layers]
        return Source(states, layout, projections, self.config.decoder_attention_heads)

    def new_cache(self, num_rows: int, max_length: int) -> DecoderCache:
        """Return an empty cache for rows of at most `max_length` tokens, the start token included.

        Raises: TooLongError when the decoder has fewer positions.
        """
        limit = self.config.max_decoder_position_embeddings
        if max_length > limit:
            raise TooLongError(
                f"outputs of {max_length} tokens are asked for but the decoder has {limit} "
                "positions; ask for shorter outputs"
            )
        heads = self.config.decoder_attention_heads
        return DecoderCache(
            self.config.decoder_layers,
            num_rows,
            heads,
            self.config.d_model // heads,
            max_length,
            dtype=self.dtype,
            device=self.device,
        )

    def decode_step(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        cache: DecoderCache,
        source: Source,
        rows_per_document: int,
    ) -> Tensor:
        """Add one token to each row and return the logits [R, V] of its next one, in float32.

        Shapes: token_ids, lengths [R]; the rows of document i start at i * rows_per_document.
            `lengths` are the tokens already in the cache and so the new token's position; rows may
            differ. They are read on the host: kept on the CPU, nothing waits for the device.
        Raises: ShapeError when rows, cache and source do not fit together.
        """
        states = self.led.decoder.step(token_ids, lengths, cache, source, rows_per_document)
        logits: Tensor = self.lm_head(states) + self.final_logits_bias
        return logits.float()
