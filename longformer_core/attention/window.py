"""The one attention operation of the encoder, whatever computes it.

Shape letters: T packed tokens, H heads, D head dimension.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longformer_core.attention.band import Band
from longformer_core.attention.blocked.attention import blocked_attention
from longformer_core.attention.dispatch import (
    Implementation,
    choose,
    in_one_dtype,
    without_autocast,
)
from longformer_core.attention.reference import reference_attention
from longformer_core.errors import ConfigError, ShapeError
from longformer_core.layout import Layout


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    radius: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    dilation: int | Sequence[int] = 1,
    dropout_p: float = 0.0,
    implementation: Implementation = "auto",
) -> Tensor:
    """Let each token attend to itself, `radius` tokens either side, and every global token.

    Query i sees key j of the same document iff both are valid and j is in i's window or global; a
    global key inside the window counts once. With a `dilation` the window's tokens lie that far
    apart; with `causal` no key lies behind its query, global or not. Rows of global tokens are
    computed like any other; the caller replaces them (see `global_attention.py`). With
    `dropout_p` each probability is dropped with that chance and the others are scaled to make up;
    the seed comes from torch's global generator.
    "auto" takes `fused` on CUDA devices that have a kernel for the case and `blocked` otherwise.

    >>> import torch
    >>> from longformer_core import Layout, window_attention
    >>> layout = Layout.from_lengths([5, 3], [[0], []])  # two documents, one global token
    >>> q, k, v = torch.randn(3, 8, 2, 16)  # their 8 tokens, 2 heads of 16
    >>> window_attention(q, k, v, layout, radius=2).shape
    torch.Size([8, 2, 16])

    Shapes: q, k, v [T, H, D] of one dtype; returns [T, H, D] in it, under torch.autocast in its.
    Units: `radius` counts keys, one side; `dilation` in tokens, one number or one for each head;
        `scale` multiplies the scores, 1/sqrt(D) when None.
    Numerics: softmax in float32 (float64 for float64 inputs); a row of an invalid token, and a
        token that sees no key, gives zeros, never NaN.
    Raises: ShapeError when shapes, dtypes, device, radius or dilation do not fit; ConfigError for
        an unknown implementation, one that cannot run here, and a chance outside 0 to 1.
    Source: Longformer, arXiv:2004.05150, section 3.1.
    """
    band = Band.of(radius, _num_heads(q), dilation, causal=causal)
    return _run(implementation, q, k, v, layout, band, scale, dropout_p, needs_lse=False)[0]


def window_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    radius: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    dilation: int | Sequence[int] = 1,
    dropout_p: float = 0.0,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Return what `window_attention` does, and what its softmax divided by, as a logarithm.

    Two attentions of the same queries to different keys become one by the second result.
    Shapes: [T, H, D] and [T, H].
    Numerics: the second is the natural logarithm of the sum of exp over a row's visible scaled
        scores, before dropout, in float32 (float64 for float64 inputs), -inf for a row that sees
        no key. It has no gradient.
    Raises: as `window_attention`.
    """
    band = Band.of(radius, _num_heads(q), dilation, causal=causal)
    return _run(implementation, q, k, v, layout, band, scale, dropout_p, needs_lse=True)


def _num_heads(q: Tensor) -> int:
    if q.dim() != 3:
        raise ShapeError(f"q has shape {list(q.shape)}; it must be [tokens, heads, head dimension]")
    return q.shape[1]


def _checked(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout_p: float, implementation: str
) -> str:
    """Return the implementation that computes these inputs; raise where something does not fit."""
    if q.shape != k.shape or q.shape != v.shape:
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
    if not 0 <= dropout_p <= 1:
        raise ConfigError(f"dropout_p is {dropout_p}; a chance lies between 0 and 1")
    return choose(implementation, q.device, q.dtype, q.shape[2])


def _run(
    implementation: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    band: Band,
    scale: float | None,
    dropout_p: float,
    *,
    needs_lse: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v = in_one_dtype(q, k, v)
    chosen = _checked(q, k, v, layout, dropout_p, implementation)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    dropout = (dropout_p, int(torch.randint(2**63 - 1, ())) if dropout_p else 0)
    if chosen == "reference":
        with without_autocast(q):
            return reference_attention(q, k, v, layout, band, factor, dropout)
    if chosen == "blocked":
        return blocked_attention(q, k, v, layout, band, factor, dropout, needs_lse=needs_lse)
    # Here and not above: everything else runs without Triton.
    from longformer_core.attention.fused.window import fused_attention

    return fused_attention(q, k, v, layout, band, factor, dropout)
