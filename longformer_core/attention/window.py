"""The one attention operation of the encoder, whatever computes it.

Shape letters: T packed tokens, H heads, D head dimension.
"""

import functools
import logging
import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from longformer_core.attention.band import Band
from longformer_core.attention.blocked import blocked_attention
from longformer_core.attention.reference import reference_attention
from longformer_core.errors import ConfigError, ShapeError
from longformer_core.layout import Layout

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "reference", "blocked", "fused"]
# What the Triton kernels take.
_FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FUSED_HEAD_DIMS = (16, 128)
_FUSED_CAPABILITY = (8, 0)


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
    computed like any other; the caller replaces them (see `rows.global_attention`). With
    `dropout_p` each probability is dropped with that chance and the others are scaled to make up;
    the seed comes from torch's global generator.
    "auto" takes `fused` on CUDA devices that have a kernel for the case and `blocked` otherwise.
    Shapes: q, k, v [T, H, D]; returns [T, H, D] in q's dtype.
    Units: `radius` counts keys, one side; `dilation` in tokens, one number or one for each head;
        `scale` multiplies the scores, 1/sqrt(D) when None.
    Numerics: softmax in float32 (float64 for float64 inputs); a row of an invalid token, and a
        token that sees no key, gives zeros, never NaN.
    Raises: ShapeError when shapes, device, radius or dilation do not fit; ConfigError for an
        unknown implementation, one that cannot run here, and a chance outside 0 to 1.
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
    if implementation not in get_args(Implementation):
        raise ConfigError(
            f"there is no implementation {implementation!r}; choose one of "
            f"{list(get_args(Implementation))}"
        )
    if implementation in ("blocked", "reference"):
        return implementation
    chosen: str = _choose(implementation, q.device, q.dtype, q.shape[2])
    return chosen


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return "fused" or "blocked" for "auto", and "fused" for itself, if it can run."""
    reason = _why_not_fused(device, dtype, head_dim)
    if implementation == "fused":
        # Triton's interpreter runs kernels on any device; nobody wants that by default.
        if reason and not (device.type == "cpu" and _is_interpreted()):
            raise ConfigError(f"the fused attention cannot run: {reason}; leave it to 'auto'")
        return "fused"
    if reason:
        level = logging.WARNING if device.type == "cuda" else logging.INFO
        _say(level, f"attention is blocked, in plain PyTorch: {reason}")
        return "blocked"
    _say(logging.INFO, f"attention is fused, by Triton kernels, on {device.type}")
    return "fused"


def _why_not_fused(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"kernels need a CUDA device, the tokens are on {device.type}"
    if find_spec("triton") is None:
        return "kernels need the package triton, which is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _FUSED_CAPABILITY:
        return f"kernels need compute capability 8.0, this device has {capability}"
    if dtype not in _FUSED_DTYPES:
        return f"kernels take {', '.join(map(str, _FUSED_DTYPES))}, not {dtype}"
    if not _FUSED_HEAD_DIMS[0] <= head_dim <= _FUSED_HEAD_DIMS[1]:
        return f"kernels take head dimensions of 16 to 128, not {head_dim}"
    return None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


@functools.cache
def _say(level: int, message: str) -> None:
    """Log a message, once in the life of the process."""
    logger.log(level, message)


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
    chosen = _checked(q, k, v, layout, dropout_p, implementation)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    dropout = (dropout_p, int(torch.randint(2**63 - 1, ())) if dropout_p else 0)
    if chosen == "reference":
        return reference_attention(q, k, v, layout, band, factor, dropout)
    if chosen == "blocked":
        return blocked_attention(q, k, v, layout, band, factor, dropout, needs_lse=needs_lse)
    # Here and not above: it is the only file that needs Triton.
    from longformer_core.attention.fused import fused_attention

    return fused_attention(q, k, v, layout, band, factor, dropout)
