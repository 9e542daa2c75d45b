"""The layers of LED: an encoder with window and global attention, a decoder that reads its states.

Module and parameter names are the published ones, for checkpoints fit without renaming.
Shape letters: B documents, S source slots and N target tokens of a padded batch, T packed tokens,
R decoder rows, H heads, D head dimension, d = H * D.
Source: Longformer, arXiv:2004.05150, section 7; layers as in BART, arXiv:1910.13461.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longformer_core.attention.cross_attention import CrossAttentionCache
from longformer_core.attention.global_attention import Form
from longformer_core.config import LEDConfig
from longformer_core.layout import Layout
from longformer_core.models.layers import LayerStack, activation
from longformer_core.models.self_attention import LongformerSelfAttention
from longformer_core.ops.chunking import in_chunks
from longformer_core.ops.dropout import dropout
from longformer_core.ops.linear import Linear

# Published LED clamps a float16 layer's infinities to this distance from the largest number.
_HALF_MARGIN = 1000


class LEDEncoderAttention(nn.Module):
    """Self-attention and its output projection."""

    def __init__(self, config: LEDConfig, radius: int) -> None:
        """Make one layer's attention that looks `radius` tokens either side."""
        super().__init__()
        self.longformer_self_attn = LongformerSelfAttention(
            config.d_model, config.encoder_attention_heads, radius, config.attention_dropout
        )
        self.output = Linear(config.d_model, config.d_model)

    def forward(self, states: Tensor, layout: Layout) -> Tensor:
        """Return [T, d]."""
        out: Tensor = self.output(self.longformer_self_attn(states, layout))
        return out


class LEDFeedForward(nn.Module):
    """What encoder and decoder layers end with; a base class, for the published names are flat."""

    def __init__(self, config: LEDConfig, width: int) -> None:
        """Make the two projections and the last normalisation."""
        super().__init__()
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.activation = activation(config.activation_function)
        self.fc1 = Linear(config.d_model, width)
        self.fc2 = Linear(width, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def drop(self, states: Tensor) -> Tensor:
        """Return what a layer adds to its input, dropped out in training."""
        return dropout(states, self.dropout, self.training)

    def feed_forward(self, states: Tensor) -> Tensor:
        """Return the layer's result of what its attentions left."""
        inner = self.activation(self.fc1(states))
        inner = dropout(inner, self.activation_dropout, self.training)
        out: Tensor = self.final_layer_norm(states + self.drop(self.fc2(inner)))
        return out


class LEDEncoderLayer(LEDFeedForward):
    """Attention and feed-forward, each added to its input and normalised after."""

    def __init__(self, config: LEDConfig, radius: int) -> None:
        """Make one layer that looks `radius` tokens either side."""
        super().__init__(config, config.encoder_ffn_dim)
        self.self_attn = LEDEncoderAttention(config, radius)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, states: Tensor, layout: Layout) -> Tensor:
        """Return the next states [T, d]."""
        return in_chunks(self._after_attention, self.self_attn(states, layout), states)

    def _after_attention(self, attended: Tensor, states: Tensor) -> Tensor:
        out = self.feed_forward(self.self_attn_layer_norm(states + self.drop(attended)))
        if out.dtype == torch.float16:
            # Always, not only when an infinity is present: no document may depend on another, and
            # looking would wait for the device.
            limit = torch.finfo(out.dtype).max - _HALF_MARGIN
            out = out.clamp(-limit, limit)
        return out


class LEDEncoder(LayerStack):
    """Token and position embeddings and the encoder layers."""

    def __init__(self, config: LEDConfig, embed_tokens: nn.Embedding) -> None:
        """Make the encoder around a (usually shared) token embedding."""
        super().__init__(config.encoder_layerdrop)
        d = config.d_model
        self.dropout = config.dropout
        self.embed_tokens = embed_tokens
        self.embed_positions = nn.Embedding(config.max_encoder_position_embeddings, d)
        self.layers = nn.ModuleList(LEDEncoderLayer(config, radius) for radius in config.radii)
        self.layernorm_embedding = nn.LayerNorm(d)

    def forward(
        self,
        words: Tensor,
        positions: Tensor,
        layout: Layout,
        every: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the states [T, d] of a packed batch; the list gets those of all layers.

        Shapes: words [T, d]; positions [T].
        """
        states: Tensor = self.layernorm_embedding(words + self.embed_positions(positions))
        states = dropout(states, self.dropout, self.training)
        return self.run(self.layers, states, every, layout)


class SelfAttention(Protocol):
    """What a decoder's tokens see of their own side."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [R, H * D] of queries, and of their own keys and values [R, H, D]."""
        ...


class CrossAttention(Protocol):
    """What a decoder's tokens see of the documents."""

    def attend(self, layer: int, q: Tensor, rows: Any, /, *, dropout_p: float = 0.0) -> Tensor:
        """Return [R, H * D] of queries [R, H, D], so many `rows` of each document."""
        ...


@dataclass
class DecoderMaps:
    """The attention probabilities of a decoder, layer by layer, for those who look at them.

    Shapes: encoder_states [B, S, d]; is_visible [B, S]; the maps [B, H, N, ...] over the target's
        tokens and over the source's.
    """

    encoder_states: Tensor
    is_visible: Tensor
    own: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)

    def note_cross(self, q: Tensor, keys: Tensor) -> None:
        """Add the probabilities of rows q [R, H, D] over source keys [B, S, H, D]."""
        q = q.view(len(keys), -1, *q.shape[1:])
        scores = torch.einsum("bnhe,bshe->bhns", q, keys) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~self.is_visible[:, None, None], -torch.inf)
        self.cross.append(scores.softmax(-1).nan_to_num(0.0))


class LEDDecoderAttention(nn.Module):
    """The four projections of one decoder attention; what it attends to is held elsewhere."""

    def __init__(self, config: LEDConfig) -> None:
        """Make the projections, under BART's names."""
        super().__init__()
        d = config.d_model
        self.num_heads = config.decoder_attention_heads
        self.k_proj = Linear(d, d)
        self.v_proj = Linear(d, d)
        self.q_proj = Linear(d, d)
        self.out_proj = Linear(d, d)

    def heads(self, module: nn.Module, states: Tensor) -> Tensor:
        """Return `module(states)` [..., d] as [..., H, D]."""
        return torch.unflatten(module(states), -1, (self.num_heads, -1))


class LEDDecoderLayer(LEDFeedForward):
    """Attention to the row's own tokens, attention to the document, feed-forward."""

    def __init__(self, config: LEDConfig, index: int) -> None:
        """Make the layer with this number in self-attention and source."""
        super().__init__(config, config.decoder_ffn_dim)
        self.index = index
        self.attention_dropout = config.attention_dropout
        self.self_attn = LEDDecoderAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = LEDDecoderAttention(config)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        states: Tensor,
        attention: SelfAttention,
        source: CrossAttention,
        rows: int | Sequence[int],
        maps: DecoderMaps | None = None,
    ) -> Tensor:
        """Return the next states [R, d] of the new tokens, `rows` of them per document.

        rows: one number for all documents, or one for each where the source takes that.
        """
        own, cross = self.self_attn, self.encoder_attn
        q, k, v = (own.heads(m, states) for m in (own.q_proj, own.k_proj, own.v_proj))
        out = own.out_proj(attention.attend(self.index, q, k, v))
        states = self.self_attn_layer_norm(states + self.drop(out))
        q = cross.heads(cross.q_proj, states)
        if maps is not None:
            maps.note_cross(q, cross.heads(cross.k_proj, maps.encoder_states))
        p = self.attention_dropout if self.training else 0.0
        out = cross.out_proj(source.attend(self.index, q, rows, dropout_p=p))
        states = self.encoder_attn_layer_norm(states + self.drop(out))
        return self.feed_forward(states)


class LEDDecoder(LayerStack):
    """Token and position embeddings and the decoder layers."""

    def __init__(self, config: LEDConfig, embed_tokens: nn.Embedding) -> None:
        """Make the decoder around a (usually shared) token embedding."""
        super().__init__(config.decoder_layerdrop)
        d = config.d_model
        self.dropout = config.dropout
        self.num_heads = config.decoder_attention_heads
        self.embed_tokens = embed_tokens
        self.embed_positions = nn.Embedding(config.max_decoder_position_embeddings, d)
        self.layers = nn.ModuleList(
            LEDDecoderLayer(config, index) for index in range(config.decoder_layers)
        )
        self.layernorm_embedding = nn.LayerNorm(d)

    def forward(
        self,
        words: Tensor,
        positions: Tensor,
        attention: SelfAttention,
        source: CrossAttention,
        rows: int | Sequence[int],
        every: list[Tensor] | None = None,
        maps: DecoderMaps | None = None,
    ) -> Tensor:
        """Return the last layer's states [R, d] of new tokens; the list gets those of all layers.

        Shapes: words [R, d]; positions [R]; rows, see `LEDDecoderLayer.forward`.
        """
        states: Tensor = self.layernorm_embedding(words + self.embed_positions(positions))
        states = dropout(states, self.dropout, self.training)
        return self.run(self.layers, states, every, attention, source, rows, maps)

    def source(
        self,
        states: Tensor,
        layout: Layout,
        *,
        num_rows: int | Sequence[int] | None = None,
        form: Form = "auto",
    ) -> CrossAttentionCache:
        """Prepare what cross-attention needs of encoder states [T, d], each document once.

        `num_rows` and `form` choose between keys and values and the states alone; see
        `CrossAttentionCache`.
        """
        pairs = []
        for layer in self.layers:
            assert isinstance(layer, LEDDecoderLayer)
            pairs.append((layer.encoder_attn.k_proj, layer.encoder_attn.v_proj))
        return CrossAttentionCache(
            states, layout, pairs, self.num_heads, num_rows=num_rows, form=form
        )
