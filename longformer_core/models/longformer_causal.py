"""A language model on causal windows: each token guesses the next from what lies before it.

Layers normalise before each sublayer, which trains small models without care. Positions are
rotations of queries and keys by their place in the document: a score depends on the distance
alone, as in the paper, and there is no table to outgrow.
Shape letters: B documents, S slots of the padded batch, T packed tokens, H heads, D head dimension,
d = H * D hidden size, V vocabulary.
Source: Longformer, arXiv:2004.05150, section 4; rotary positions, arXiv:2104.09864.
"""

import torch
from torch import Tensor, nn

from longformer_core.attention.window import window_attention
from longformer_core.config import LongformerCausalConfig, LongformerConfig
from longformer_core.layout import Layout
from longformer_core.models.layers import LayerStack, activation, check_ids
from longformer_core.models.losses import next_token_labels, refuse_masked, token_logits
from longformer_core.models.outputs import LongformerCausalLMOutput
from longformer_core.models.packing import padded_batch
from longformer_core.models.pretrained import PretrainedModel
from longformer_core.ops.dropout import dropout
from longformer_core.ops.linear import Linear

# The slowest pair of numbers turns once in about 2 pi times as many tokens.
_SLOWEST = 10_000.0


class LongformerCausalAttention(nn.Module):
    """Window attention to the keys before a token."""

    def __init__(
        self, config: LongformerCausalConfig, radius: int, dilations: tuple[int, ...]
    ) -> None:
        """Make the projections of one layer that looks `radius` keys back."""
        super().__init__()
        d = config.hidden_size
        self.radius = radius
        self.dilations = dilations
        self.dropout = config.attention_probs_dropout_prob
        self.qkv = Linear(d, 3 * d)
        self.output = Linear(d, d)

    def forward(self, states: Tensor, layout: Layout, rotation: Tensor) -> Tensor:
        """Return [T, d]; `rotation` is that of `cos_sin`."""
        qkv = torch.unflatten(self.qkv(states), -1, (3, len(self.dilations), -1))
        q, k, v = qkv.unbind(1)
        out = window_attention(
            rotate(q, rotation),
            rotate(k, rotation),
            v,
            layout,
            self.radius,
            causal=True,
            dilation=self.dilations,
            dropout_p=self.dropout if self.training else 0.0,
        )
        projected: Tensor = self.output(out.flatten(1))
        return projected


class LongformerCausalLayer(nn.Module):
    """Attention and feed-forward of normalised states, each added to its input."""

    def __init__(
        self, config: LongformerCausalConfig, radius: int, dilations: tuple[int, ...]
    ) -> None:
        """Make one layer."""
        super().__init__()
        d = config.hidden_size
        self.attention_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.attention = LongformerCausalAttention(config, radius, dilations)
        self.intermediate_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.intermediate = Linear(d, config.intermediate_size)
        self.activation = activation(config.hidden_act)
        self.output = Linear(config.intermediate_size, d)
        self.dropout = config.hidden_dropout_prob

    def forward(self, states: Tensor, layout: Layout, rotation: Tensor) -> Tensor:
        """Return the next states [T, d]."""
        attended = self.attention(self.attention_norm(states), layout, rotation)
        states = states + dropout(attended, self.dropout, self.training)
        inner = self.activation(self.intermediate(self.intermediate_norm(states)))
        out: Tensor = states + dropout(self.output(inner), self.dropout, self.training)
        return out


class LongformerCausalDecoder(LayerStack):
    """The layers and the norm after the last."""

    def __init__(self, config: LongformerCausalConfig) -> None:
        """Make one layer per radius."""
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.layer = nn.ModuleList(
            LongformerCausalLayer(config, radius, dilations)
            for radius, dilations in zip(config.radii, config.dilations, strict=True)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor, layout: Layout, every: list[Tensor] | None = None) -> Tensor:
        """Return the states [T, d]; the list gets those before and after each layer."""
        rotation = cos_sin(layout.positions, self.head_dim)
        out: Tensor = self.norm(self.run(self.layer, states, every, layout, rotation))
        return out


class LongformerForCausalLM(PretrainedModel[LongformerConfig]):
    """Guess the next token."""

    config_class = LongformerCausalConfig

    def __init__(self, config: LongformerCausalConfig) -> None:
        """Make the model with weights drawn from torch's global generator."""
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = config.hidden_dropout_prob
        self.decoder = LongformerCausalDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> LongformerCausalLMOutput:
        """Return logits [B, S, V] of the token after each, and the loss over labels but -100.

        Labels are those of the tokens themselves, as in `labels=input_ids`: they are moved by one.
        Shapes: input_ids, attention_mask and labels [B, S].
        Raises: ShapeError when shapes or ids do not fit, and for a label where `attention_mask` is
            0.
        """
        check_ids("input_ids", input_ids, self.config.vocab_size)
        batch = padded_batch([input_ids], attention_mask, None)
        states = dropout(self.word_embeddings(batch.pack(input_ids)), self.dropout, self.training)
        every: list[Tensor] | None = [] if output_hidden_states else None
        last = batch.unpack(self.decoder(states, batch.layout, every))
        if labels is not None:
            refuse_masked(labels, attention_mask)
            labels = next_token_labels(labels)
        logits, loss = token_logits(self.lm_head, last, labels)
        hidden = None if every is None else tuple(map(batch.unpack, every))
        return LongformerCausalLMOutput(loss, logits, hidden)

    @classmethod
    def _base_name(cls) -> str:
        return ""  # its parts stand side by side

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of token embeddings."""
        return self.word_embeddings

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        """Use another table of token embeddings; what is tied to it follows."""
        self.word_embeddings = embedding
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let embeddings and output projection share their weight again, if the config ties."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.word_embeddings.weight


def cos_sin(positions: Tensor, head_dim: int) -> Tensor:
    """Return cos + i sin of the angles by which positions [T] rotate: [T, 1, D / 2].

    Numerics: complex64, whatever the dtype of the model.
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angles = positions[:, None, None].float() * _SLOWEST**-pairs
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Return [T, H, D] with each pair of neighbouring numbers rotated."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(x.to(wide).reshape(*x.shape[:2], x.shape[2] // 2, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
