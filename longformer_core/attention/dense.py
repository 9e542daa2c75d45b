"""Attention probabilities for those who look at them, computed apart from the fast path.

Shape letters: N tokens of one document, g global ones of it, T packed tokens, G global ones, x most
global tokens of a document, H heads, D head dimension.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from longformer_core.attention.band import Band
from longformer_core.attention.reference import visible_keys
from longformer_core.errors import ShapeError
from longformer_core.layout import Layout


def dense_probabilities(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    radius: int,
    *,
    q_global: Tensor | None = None,
    k_global: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return how much each token (row) attends to each other one (column), N x N per head.

    A local token's row is `window_attention`'s softmax, a global token's that of
    `global_attention`. Rows sum to 1; those of invalid tokens are zeros.
    Shapes: q, k [N, H, D]; q_global [g, H, D] in the order of the global positions and k_global
        [N, H, D], needed when the document has global tokens; returns [H, N, N].
    Units: `radius` in tokens, one side; `scale` multiplies the scores, 1/sqrt(D) when None.
    Numerics: float32, float64 for float64 inputs; memory H * N * N.
    Raises: ShapeError for more than one document, and for shapes that do not fit it.
    """
    positions = _check(q, k, layout, q_global, k_global)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    band = Band.of(radius, q.shape[1])
    sees = visible_keys(len(q), band, tuple(positions), layout.is_valid).to(q.device)
    scores = _scores(q, k) * scale
    if q_global is not None and k_global is not None:
        scores[:, positions] = _scores(q_global, k_global) * scale
        sees[:, positions] = True if layout.is_valid is None else layout.is_valid
    # A row that sees nothing is NaN after the softmax, and hidden with all its columns.
    return scores.masked_fill(~sees, -torch.inf).softmax(-1).masked_fill(~sees, 0.0)


def _check(
    q: Tensor, k: Tensor, layout: Layout, q_global: Tensor | None, k_global: Tensor | None
) -> list[int]:
    """Return the global positions of the one document."""
    if layout.num_documents != 1:
        raise ShapeError(
            f"the layout describes {layout.num_documents} documents; a matrix is of one only"
        )
    shape = (layout.num_tokens, *q.shape[1:])
    if q.dim() != 3 or q.shape != shape or k.shape != shape:
        raise ShapeError(
            f"q and k have shapes {list(q.shape)} and {list(k.shape)}; both must be [tokens, heads,"
            f" head dimension] with {layout.num_tokens} tokens"
        )
    positions = list(layout.global_positions[0])
    given = None if q_global is None else tuple(q_global.shape)
    keys = None if k_global is None else tuple(k_global.shape)
    if positions and (given != (len(positions), *shape[1:]) or keys != shape):
        raise ShapeError(
            f"q_global and k_global have shapes {given} and {keys}; a document with "
            f"{len(positions)} global tokens needs {(len(positions), *shape[1:])} and {shape}"
        )
    return positions


def _scores(q: Tensor, k: Tensor) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("ihe,jhe->hij", q.to(dtype), k.to(dtype))


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
    keys = pad(k, (0, 0, 0, 0, radius, radius)).unfold(0, window, 1)
    seen = pad(local, (radius, radius)).unfold(0, window, 1)
    band = torch.einsum("nhe,nhew->nhw", q, keys).masked_fill(~seen[:, None], -torch.inf)
    columns = torch.einsum("nhe,ghe->nhg", q, k[chosen])
    return torch.cat([columns, band], -1) / math.sqrt(q.shape[-1])


def _softmax(scores: Tensor) -> Tensor:
    """Return probabilities over the last axis, zeros where nothing is seen."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).nan_to_num(0.0).to(scores.dtype)
