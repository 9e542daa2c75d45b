"""The one attention operation of the encoder, whatever computes it.

Shape letters: T packed tokens, H heads, D head dimension.
"""

import math
from typing import Literal

from torch import Tensor

from longformer_core.attention.blocked import blocked_attention
from longformer_core.attention.reference import reference_attention
from longformer_core.errors import ConfigError, ShapeError
from longformer_core.layout import Layout

Implementation = Literal["auto", "reference", "blocked"]
_IMPLEMENTATIONS = {
    "auto": blocked_attention,
    "blocked": blocked_attention,
    "reference": reference_attention,
}


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    radius: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    implementation: Implementation = "auto",
) -> Tensor:
    """Let each token attend to itself, `radius` tokens either side, and every global token.

    Query i sees key j of the same document iff j is valid and (|i - j| <= radius or j is global),
    so a global key inside the window counts once. Rows of global tokens are computed like any
    other; the caller replaces them (see `rows.global_attention`). With `dropout_p` each probability
    is dropped with that chance and the others are scaled to make up, by torch's global generator.
    Shapes: q, k, v [T, H, D]; returns [T, H, D] in q's dtype.
    Units: `radius` in tokens, one side; `scale` multiplies the scores, 1/sqrt(D) when None.
    Numerics: softmax in float32 (float64 for float64 inputs); a row of an invalid token, and a
        token that sees no key, gives zeros, never NaN.
    Raises: ShapeError when shapes, device or radius do not fit; ConfigError for an unknown
        implementation.
    Source: Longformer, arXiv:2004.05150, section 3.1.
    """
    if q.dim() != 3 or q.shape != k.shape or q.shape != v.shape:
        raise ShapeError(
            f"q, k, v have shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; "
            "all three must be the same [tokens, heads, head dimension]"
        )
    if q.shape[0] != layout.num_tokens:
        raise ShapeError(
            f"q, k, v hold {q.shape[0]} tokens but the layout describes {layout.num_tokens}; "
            "build the layout from the lengths of the packed documents"
        )
    if layout.device != q.device:
        raise ShapeError(
            f"the layout is on {layout.device} but q is on {q.device}; "
            "give Layout.from_lengths the device of the tokens"
        )
    if radius < 1:
        raise ShapeError(f"radius is {radius}; a token sees at least 1 token either side")
    run = _IMPLEMENTATIONS.get(implementation)
    if run is None:
        raise ConfigError(
            f"there is no implementation {implementation!r}; choose one of {list(_IMPLEMENTATIONS)}"
        )
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return run(q, k, v, layout, radius, factor, dropout_p)
