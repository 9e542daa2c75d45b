"""The definition of window attention: one dense mask per document, nothing clever.

Shape letters: n tokens of one document, H heads, D head dimension.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import dropout

from longformer_core.layout import Layout


def visible_keys(
    length: int, radius: int, global_positions: tuple[int, ...], is_valid: Tensor | None
) -> Tensor:
    """Return [n, n] bool: query i (row) of one document sees key j (column)."""
    i = torch.arange(length)
    sees = (i[:, None] - i[None, :]).abs() <= radius
    sees[:, list(global_positions)] = True
    if is_valid is not None:
        sees &= is_valid.cpu()[None, :] & is_valid.cpu()[:, None]
    return sees


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    radius: int,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute `window_attention` with a full score matrix per document, as the oracle of tests.

    Numerics: scores and softmax in float32, in float64 for float64 inputs.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    outputs = [q.new_zeros(0, *q.shape[1:])]
    for (start, end), positions in zip(
        pairwise(layout.cu_seqlens), layout.global_positions, strict=True
    ):
        is_valid = None if layout.is_valid is None else layout.is_valid[start:end]
        sees = visible_keys(end - start, radius, positions, is_valid).to(q.device)
        queries, keys, values = (x[start:end].to(dtype).transpose(0, 1) for x in (q, k, v))
        scores = queries @ keys.transpose(1, 2) * scale
        # A row without any key would be NaN after the softmax; it is zero by definition.
        scores = scores.masked_fill(~sees, -torch.inf).masked_fill(~sees.any(1)[:, None], 0.0)
        weights = dropout(scores.softmax(-1).masked_fill(~sees, 0.0), dropout_p)
        outputs.append((weights @ values).transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)
