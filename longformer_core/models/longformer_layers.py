"""The layers of Longformer: embeddings, an encoder with window and global attention, the pooler.

Module and parameter names are the published ones, for checkpoints fit without renaming.
Shape letters: B documents, S slots of a padded batch, T packed tokens, d hidden size.
Source: Longformer, arXiv:2004.05150; layers as in RoBERTa, arXiv:1907.11692.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from longformer_core.config import LongformerConfig
from longformer_core.errors import TooLongError
from longformer_core.layout import Layout
from longformer_core.models.layers import LayerStack, activation
from longformer_core.models.self_attention import LongformerSelfAttention
from longformer_core.ops.chunking import in_chunks
from longformer_core.ops.dropout import dropout
from longformer_core.ops.linear import Linear


class LongformerEmbeddings(nn.Module):
    """Words, positions and token types, added and normalised."""

    def __init__(self, config: LongformerConfig) -> None:
        """Make the three tables."""
        super().__init__()
        d, pad = config.hidden_size, config.pad_token_id
        self.pad_token_id = pad or 0
        self.max_length = config.max_length
        self.word_embeddings = nn.Embedding(config.vocab_size, d, padding_idx=pad)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, d)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, d, padding_idx=pad)
        self.LayerNorm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, words: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        """Return [T, d] of word embeddings [T, d], positions [T] and token types [T]."""
        states = words + self.position_embeddings(positions) + self.token_type_embeddings(types)
        out: Tensor = dropout(self.LayerNorm(states), self.dropout, self.training)
        return out

    def count_positions(self, input_ids: Tensor | None, slots: Tensor) -> Tensor:
        """Return positions [B, S]: from `pad_token_id` + 1, over the tokens that are not padding.

        Of embeddings (ids None) nobody knows which are padding: all of the `slots` [B, S] count.
        Raises: TooLongError when a document has more tokens than there are positions.
        """
        pad = self.pad_token_id
        counted = slots + 1
        if input_ids is not None:
            real = input_ids.ne(pad)
            counted = real.cumsum(1) * real
        self._check_longest(counted)
        return counted + pad

    def count_packed_positions(self, input_ids: Tensor, layout: Layout) -> Tensor:
        """Return what `count_positions` does, of packed documents: [T].

        Raises: as there.
        """
        pad = self.pad_token_id
        real = input_ids.ne(pad)
        ends = functional.pad(real.cumsum(0), (1, 0))
        lengths = layout.offsets.diff()
        before = ends[layout.offsets[:-1].long()].repeat_interleave(
            lengths, output_size=layout.num_tokens
        )
        counted = (ends[1:] - before) * real
        self._check_longest(counted)
        return counted + pad

    def _check_longest(self, counted: Tensor) -> None:
        longest = int(counted.max()) if counted.numel() else 0
        if longest > self.max_length:
            raise TooLongError(
                f"a document has {longest} tokens but the model has {self.max_length} "
                "positions; shorten the document or choose a model with more positions"
            )


class LongformerSelfOutput(nn.Module):
    """A projection added to its layer's input and normalised."""

    def __init__(self, config: LongformerConfig, width: int) -> None:
        """Make the projection from `width` to the hidden size."""
        super().__init__()
        self.dense = Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """Return [T, d]."""
        out: Tensor = self.LayerNorm(
            dropout(self.dense(states), self.dropout, self.training) + residual
        )
        return out


class LongformerLayer(nn.Module):
    """Attention and feed-forward, each added to its input and normalised after."""

    def __init__(self, config: LongformerConfig, radius: int) -> None:
        """Make one layer that looks `radius` tokens either side."""
        super().__init__()
        d = config.hidden_size
        self.attention = nn.ModuleDict(
            {
                "self": LongformerSelfAttention(
                    d, config.num_attention_heads, radius, config.attention_probs_dropout_prob
                ),
                "output": LongformerSelfOutput(config, d),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": Linear(d, config.intermediate_size)})
        self.activation = activation(config.hidden_act)
        self.output = LongformerSelfOutput(config, config.intermediate_size)

    def forward(self, states: Tensor, layout: Layout) -> Tensor:
        """Return the next states [T, d]."""
        return in_chunks(self._after_attention, self.attention["self"](states, layout), states)

    def _after_attention(self, attended: Tensor, states: Tensor) -> Tensor:
        states = self.attention["output"](attended, states)
        inner = self.activation(self.intermediate["dense"](states))
        out: Tensor = self.output(inner, states)
        return out


class LongformerEncoder(LayerStack):
    """The layers."""

    def __init__(self, config: LongformerConfig) -> None:
        """Make one layer per radius."""
        super().__init__()
        self.layer = nn.ModuleList(LongformerLayer(config, radius) for radius in config.radii)

    def forward(self, states: Tensor, layout: Layout, every: list[Tensor] | None = None) -> Tensor:
        """Return the states [T, d] after the last layer; the list gets those of all layers."""
        return self.run(self.layer, states, every, layout)


class LongformerPooler(nn.Module):
    """The first token's state through a projection and tanh."""

    def __init__(self, config: LongformerConfig) -> None:
        """Make the projection."""
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """Return [B, d] of the first tokens' states [B, d]."""
        return torch.tanh(self.dense(states))
