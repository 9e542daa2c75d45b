"""The definition of window attention: one dense mask per document, nothing clever.

Shape letters: n tokens of one document, T packed tokens, H heads, D head dimension.
"""

from itertools import pairwise

import torch
from torch import Tensor

from longformer_core.attention.band import Band
from longformer_core.attention.philox import is_kept
from longformer_core.layout import Layout


def visible_keys(
    length: int, band: Band, global_positions: tuple[int, ...], is_valid: Tensor | None
) -> Tensor:
    """Return [H, n, n] bool: query i (row) of one document sees key j (column)."""
    i = torch.arange(length)
    distance = i[:, None] - i[None, :]
    sees = torch.stack([band.sees(distance, dilation) for dilation in band.dilations])
    sees[:, :, list(global_positions)] = True
    if band.is_causal:
        sees &= distance >= 0
    if is_valid is not None:
        sees &= is_valid.cpu()[None, :] & is_valid.cpu()[:, None]
    return sees


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    band: Band,
    scale: float,
    dropout: tuple[float, int] = (0.0, 0),
) -> tuple[Tensor, Tensor]:
    """Compute `window_attention_with_lse` with full score matrices, as the oracle of tests.

    `dropout` is a probability and the seed of `is_kept`.
    Shapes: q, k, v [T, H, D]; returns [T, H, D] and [T, H].
    Numerics: scores and softmax in float32, in float64 for float64 inputs.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    outputs, sums = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(0, q.shape[1], dtype=dtype)]
    for (start, end), positions in zip(
        pairwise(layout.cu_seqlens), layout.global_positions, strict=True
    ):
        is_valid = None if layout.is_valid is None else layout.is_valid[start:end]
        sees = visible_keys(end - start, band, positions, is_valid).to(q.device)
        queries, keys, values = (x[start:end].to(dtype).transpose(0, 1) for x in (q, k, v))
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(~sees, -torch.inf)
        sums.append(scores.detach().logsumexp(-1).t())
        # A row without any key would be NaN after the softmax; it is zero by definition.
        scores = scores.masked_fill(~sees.any(-1, keepdim=True), 0.0)
        weights = _dropped(scores.softmax(-1).masked_fill(~sees, 0.0), dropout, start)
        outputs.append((weights @ values).transpose(0, 1).to(q.dtype))
    return torch.cat(outputs), torch.cat(sums)


def _dropped(weights: Tensor, dropout: tuple[float, int], start: int) -> Tensor:
    """Drop probabilities [H, n, n] of the document whose first slot is `start`, scale the rest."""
    p, seed = dropout
    if not p:
        return weights
    slots = torch.arange(start, start + weights.shape[1], device=weights.device)
    kept = is_kept(p, seed, slots, slots, weights.shape[0])
    # At a chance of 1 nothing is left to be scaled.
    return weights.masked_fill(~kept, 0.0) * (1 / (1 - p) if p < 1 else 0.0)
