"""The self-attention of both families' encoders, under its published parameter names.

Shape letters: T packed tokens, d hidden size.
"""

from torch import Tensor, nn

from longformer_core.attention.rows import global_attention
from longformer_core.attention.window import window_attention
from longformer_core.layout import Layout


class LongformerSelfAttention(nn.Module):
    """Window attention for all tokens, then full attention for the global ones."""

    def __init__(self, d: int, num_heads: int, radius: int) -> None:
        """Make the six projections of one layer; the three `_global` ones serve global rows."""
        super().__init__()
        self.num_heads = num_heads
        self.radius = radius
        self.query = nn.Linear(d, d)
        self.key = nn.Linear(d, d)
        self.value = nn.Linear(d, d)
        self.query_global = nn.Linear(d, d)
        self.key_global = nn.Linear(d, d)
        self.value_global = nn.Linear(d, d)

    def forward(self, states: Tensor, layout: Layout) -> Tensor:
        """Return [T, d], before the output projection; rows of invalid tokens are zeros."""
        q, k, v = (
            module(states).unflatten(-1, (self.num_heads, -1))
            for module in (self.query, self.key, self.value)
        )
        out = window_attention(q, k, v, layout, self.radius).flatten(1)
        if not len(layout.global_index):
            return out
        rows = global_attention(
            states, layout, self.query_global, self.key_global, self.value_global, self.num_heads
        )
        return out.index_copy(0, layout.global_index, rows)
