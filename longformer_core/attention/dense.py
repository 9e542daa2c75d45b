"""The attention of one layer as a plain matrix, for plots and for those who want to look.

Shape letters: N tokens of one document, g global ones, H heads, D head dimension.
"""

import math

import torch
from torch import Tensor

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
    `rows.global_attention`. Rows sum to 1; those of invalid tokens are zeros.
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
