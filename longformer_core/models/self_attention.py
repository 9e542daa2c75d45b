"""The self-attention of both models' encoders, under its published parameter names.

Shape letters: T packed tokens, G global ones, H heads, D head dimension, d = H * D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longformer_core.attention.dense import banded_probabilities, global_probabilities
from longformer_core.attention.global_attention import global_attention
from longformer_core.attention.window import window_attention
from longformer_core.layout import Layout
from longformer_core.ops.linear import Linear


class LongformerSelfAttention(nn.Module):
    """Window attention for all tokens, then full attention for the global ones."""

    def __init__(self, d: int, num_heads: int, radius: int, dropout: float) -> None:
        """Make the six projections of one layer; the three `_global` ones serve global rows."""
        super().__init__()
        self.dropout = dropout
        self.num_heads = num_heads
        self.radius = radius
        self.query = Linear(d, d)
        self.key = Linear(d, d)
        self.value = Linear(d, d)
        self.query_global = Linear(d, d)
        self.key_global = Linear(d, d)
        self.value_global = Linear(d, d)

    def forward(self, states: Tensor, layout: Layout) -> Tensor:
        """Return [T, d], before the output projection; rows of invalid tokens are zeros."""
        q, k, v = (self._heads(m, states) for m in (self.query, self.key, self.value))
        p = self.dropout if self.training else 0.0
        out = window_attention(q, k, v, layout, self.radius, dropout_p=p).flatten(1)
        needs_gradients = torch.is_grad_enabled() and self.key_global.weight.requires_grad
        if not len(layout.global_index) and not needs_gradients:
            return out
        rows = global_attention(
            states,
            layout,
            self.query_global,
            self.key_global,
            self.value_global,
            self.num_heads,
            dropout_p=p,
        )
        if needs_gradients:
            # Without a global token, and in the absorbed form, some of these weights are in no
            # sum; data-parallel training waits for the gradient of each, so they get zeros.
            none = states[:0]
            rows = rows + (self.key_global(none).sum() + self.value_global(none).sum())
        if torch.is_grad_enabled():
            return out.index_copy(0, layout.global_index, rows)
        # Nothing else reads the attention's own result then.
        return out.index_copy_(0, layout.global_index, rows)

    @torch.no_grad()
    def probabilities(self, states: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the probabilities [T, H, x + 2 * radius + 1] and [T, H, x] of this layer's input.

        Before dropout, without gradients; see `banded_probabilities` and `global_probabilities`.
        """
        q, k = self._heads(self.query, states), self._heads(self.key, states)
        chosen = self._heads(self.query_global, states.index_select(0, layout.global_index))
        keys = self._heads(self.key_global, states)
        return (
            banded_probabilities(q, k, layout, self.radius),
            global_probabilities(chosen, keys, layout),
        )

    def _heads(self, module: nn.Module, states: Tensor) -> Tensor:
        """Return `module(states)` [T, d] as [T, H, D]."""
        return torch.unflatten(module(states), -1, (self.num_heads, -1))


def attention_maps(
    encoder: nn.Module, every: Sequence[Tensor], layout: Layout
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the `probabilities` of an encoder's layers, given the states before each of them."""
    layers = [module for module in encoder.modules() if isinstance(module, LongformerSelfAttention)]
    maps = [
        layer.probabilities(states, layout) for layer, states in zip(layers, every, strict=False)
    ]
    return [local for local, _ in maps], [from_global for _, from_global in maps]
