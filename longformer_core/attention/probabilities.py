"""Attention probabilities for those who look at them, computed apart from the fast path.

Shape letters: T packed tokens, H heads, D head dimension, x most global tokens of a document.
"""

import math

import torch
from torch import Tensor

from longformer_core.layout import Layout


def banded_probabilities(q: Tensor, k: Tensor, layout: Layout, radius: int) -> Tensor:
    """Return how much each token attends to the global tokens and to the window around it.

    Column j < x is the document's global token j; column x + radius + o is the token at distance o.
    A global token inside the window counts among the first x only. Rows of global tokens and of
    invalid ones are zeros, and so are columns that a document does not have.
    Shapes: q, k [T, H, D]; returns [T, H, x + 2 * radius + 1].
    Numerics: softmax in float32.
    Source: transformers 5.23, `attentions` of Longformer's outputs.
    """
    x = max(layout.num_globals, default=0)
    out = q.new_zeros(*q.shape[:2], x + 2 * radius + 1)
    for start, end, chosen, is_valid in _documents(layout):
        scores = _banded_scores(q[start:end], k[start:end], chosen, is_valid, radius)
        probabilities = _softmax(scores)
        # A global token's own row is in `global_probabilities`.
        probabilities[~is_valid] = 0
        probabilities[chosen] = 0
        out[start:end, :, : len(chosen)] = probabilities[..., : len(chosen)]
        out[start:end, :, x:] = probabilities[..., len(chosen) :]
    return out


def global_probabilities(q: Tensor, k: Tensor, layout: Layout) -> Tensor:
    """Return how much each token is attended to by each global token of its document.

    Shapes: q [G, H, D] in the order of `layout.global_index`, k [T, H, D]; returns [T, H, x], with
        zeros for invalid tokens and in columns that a document does not have.
    Numerics: softmax in float32.
    Source: transformers 5.23, `global_attentions` of Longformer's outputs.
    """
    out = k.new_zeros(*k.shape[:2], max(layout.num_globals, default=0))
    first = 0
    for start, end, chosen, is_valid in _documents(layout):
        rows = q[first : first + len(chosen)]
        first += len(chosen)
        scores = torch.einsum("ghe,nhe->ghn", rows, k[start:end]) / math.sqrt(q.shape[-1])
        probabilities = _softmax(scores.masked_fill(~is_valid, -torch.inf))
        out[start:end, :, : len(chosen)] = probabilities.permute(2, 1, 0)
    return out


def _documents(layout: Layout) -> list[tuple[int, int, Tensor, Tensor]]:
    """Return start, end, global positions and validity of each document."""
    found = []
    for document, chosen in enumerate(layout.global_positions):
        start, end = layout.cu_seqlens[document : document + 2]
        if layout.is_valid is None:
            is_valid = torch.ones(end - start, dtype=torch.bool, device=layout.device)
        else:
            is_valid = layout.is_valid[start:end]
        index = torch.tensor(chosen, dtype=torch.int64, device=layout.device)
        found.append((start, end, index, is_valid))
    return found


def _banded_scores(q: Tensor, k: Tensor, chosen: Tensor, is_valid: Tensor, radius: int) -> Tensor:
    """Return the scores [n, H, g + 2 * radius + 1] of one document, -inf where nothing is seen."""
    local = is_valid.clone()
    local[chosen] = False
    window = 2 * radius + 1
    keys = torch.nn.functional.pad(k, (0, 0, 0, 0, radius, radius)).unfold(0, window, 1)
    seen = torch.nn.functional.pad(local, (radius, radius)).unfold(0, window, 1)
    band = torch.einsum("nhe,nhew->nhw", q, keys).masked_fill(~seen[:, None], -torch.inf)
    columns = torch.einsum("nhe,ghe->nhg", q, k[chosen])
    return torch.cat([columns, band], -1) / math.sqrt(q.shape[-1])


def _softmax(scores: Tensor) -> Tensor:
    """Return probabilities over the last axis, zeros where nothing is seen."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).nan_to_num(0.0).to(scores.dtype)
