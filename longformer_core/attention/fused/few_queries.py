"""Few query rows against many keys, by Triton kernels for GPUs: forward and backward.

What limits them is reading the keys and values, so each is read once for all rows of a tile, and
the keys of a document are split over many programs. Each leaves what a softmax of its keys alone
gives, and a second kernel joins the splits in their order. Going back, the rows' gradients are such
sums too, and there is a program for each tile of keys: no two runs differ by a bit.
Keys and values are [B, H, n, D] with any strides: padded groups as they are, and packed documents
as a batch of one. `segments.py` says which rows read which of them; the kernels are in
`few_queries_kernels.py`.
Shape letters: R rows, S segments, P splits, H heads, D head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longformer_core.attention.fused.common import (
    FEW_KEYS,
    FUSED_MULTIPLY_ADD,
    Tiles,
    deltas,
    device_of,
    empty_results,
    head_sizes,
    or_none,
    with_unit_stride,
)
from longformer_core.attention.fused.few_queries_kernels import (
    backward_keys_kernel,
    backward_queries_kernel,
    forward_kernel,
    join_kernel,
)
from longformer_core.attention.fused.plan import softmax_arguments
from longformer_core.attention.fused.segments import Segments
from longformer_core.ops.custom_op import fake_of, has_no_gradient, operator

# By kernel, rows of a segment up to, padded head size up to, bytes of a number. Chosen by
# compiling, like those of `window.py`: 16 rows are the least that a matrix product takes, and more
# pay only if there are more.
_TILES: dict[tuple[str, int, int, int], Tiles] = {
    ("forward", 16, 64, 2): Tiles(16, 64, 4, 3),
    ("forward", 16, 128, 2): Tiles(16, 64, 4, 2),
    ("forward", 16, 64, 4): Tiles(16, 32, 4, 2),
    ("forward", 16, 128, 4): Tiles(16, 16, 4, 2),
    ("forward", 64, 64, 2): Tiles(64, 64, 4, 3),
    ("forward", 64, 128, 2): Tiles(64, 64, 8, 2),
    ("forward", 64, 64, 4): Tiles(64, 16, 8, 2),
    ("forward", 64, 128, 4): Tiles(32, 16, 8, 1),
    ("queries", 16, 64, 2): Tiles(16, 64, 4, 2),
    ("queries", 16, 128, 2): Tiles(16, 64, 4, 2),
    ("queries", 16, 64, 4): Tiles(16, 32, 4, 1),
    ("queries", 16, 128, 4): Tiles(16, 16, 4, 1),
    ("queries", 64, 64, 2): Tiles(64, 64, 8, 2),
    ("queries", 64, 128, 2): Tiles(64, 32, 8, 2),
    ("queries", 64, 64, 4): Tiles(32, 16, 4, 1),
    ("queries", 64, 128, 4): Tiles(32, 16, 8, 1),
    ("keys", 16, 64, 2): Tiles(16, 64, 4, 1),
    ("keys", 16, 128, 2): Tiles(16, 64, 4, 1),
    ("keys", 16, 64, 4): Tiles(16, 32, 4, 1),
    ("keys", 16, 128, 4): Tiles(16, 32, 8, 1),
    ("keys", 64, 64, 2): Tiles(32, 64, 4, 2),
    ("keys", 64, 128, 2): Tiles(32, 64, 8, 2),
    ("keys", 64, 64, 4): Tiles(16, 32, 4, 1),
    ("keys", 64, 128, 4): Tiles(16, 32, 8, 1),
}
# Splits that are joined at once.
_JOINED = 32


def fused_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    rows_each: int = 1,
    *,
    scale: float,
    valid: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Let rows attend to the keys of their segment.

    Every row that `segments` counts is `rows_each` rows here, which lie together. A probability is
    dropped by the row's and the key's index; the seed comes from torch's global generator.
    Shapes: q [R, H, D]; k, v [B, H, n, D]; valid [n], for a batch of one; returns [R, H, D].
    Numerics: scores, softmax and sums in float32; probabilities and their gradients are rounded to
        the dtype of q before they are multiplied, as eager code does. For gradients of 16 bits the
        output is kept in twice as many. A row that sees no key gives zeros, never NaN.
    Source: flash decoding, which splits over the keys; the gradients: FlashAttention-2,
        arXiv:2307.08691.
    """
    assert 16 <= q.shape[-1] <= 128
    assert q.dtype == k.dtype == v.dtype
    assert len(q) == segments.num_rows * rows_each
    seed = int(torch.randint(2**63 - 1, ())) if dropout_p else 0
    flags = None if valid is None else valid.view(torch.uint8)
    given = (segments.planned, rows_each, scale, dropout_p, seed)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    # One operator: torch.compile and torch.export see a single node of known shape.
    out: Tensor = _attend(q, k, v, segments.table, flags, *given, needs_gradient)[0]
    return out


@operator("fused_rows")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    valid: Tensor | None,
    planned: Sequence[int],
    rows_each: int,
    scale: float,
    dropout_p: float,
    seed: int,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = Segments(table, *planned)
    q, k, v = (with_unit_stride(x) for x in (q, k, v))
    results = empty_results(q, needs_gradient=needs_gradient)
    with device_of(q):
        _run_forward(segments, q, k, v, results, valid, rows_each, scale, (dropout_p, seed))
    return results


@operator("fused_rows_backward")
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    remainder: Tensor,
    table: Tensor,
    valid: Tensor | None,
    planned: Sequence[int],
    rows_each: int,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = Segments(table, *planned)
    grad, q, k, v = (with_unit_stride(x) for x in (grad, q, k, v))
    with device_of(q):
        delta = deltas(grad, out, lse, remainder)
        dtype = q.dtype
        if segments.most_keys <= FEW_KEYS:
            q, k, v, grad = (x.float() for x in (q, k, v, grad))
        read = (q, k, v, grad, lse, delta)
        grads = _run_backward(segments, *read, valid, rows_each, scale, (dropout_p, seed))
        dq, dk, dv = (x.to(dtype) for x in grads)
        return dq, dk, dv


@fake_of(_attend)
def _(q: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(q, needs_gradient=given[-1])


@fake_of(_attend_backward)
def _(_: Tensor, *qkv: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq = torch.empty_like(qkv[0], memory_format=torch.contiguous_format)
    return dq, _gradient_of(qkv[1]), _gradient_of(qkv[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.given = inputs[5:-1]


def _turn(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad, *ctx.saved_tensors, *ctx.given)
    return *grads, *(None,) * (3 + len(ctx.given))


torch.library.register_autograd(_attend, _turn, setup_context=_save)
has_no_gradient(_attend_backward, "attention has no second derivative")


def _gradient_of(x: Tensor) -> Tensor:
    """Return memory for the gradient of keys or values, laid out as they are."""
    x = with_unit_stride(x)
    return torch.empty_like(x)


def _tiles(kernel: str, q: Tensor, num_rows: int) -> Tiles:
    """Return how a kernel is cut for the head size and dtype of q and the rows of a segment."""
    head = max(64, triton.next_power_of_2(q.shape[-1]))
    return _TILES[kernel, 16 if num_rows <= 16 else 64, head, q.element_size()]


def _shared(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, segments: Segments, rows_each: int
) -> dict[str, Any]:
    """Return the arguments that all kernels take which compute scores."""
    return {
        "Segments": segments.table,
        "Valid": valid,
        "stride_qr": q.stride(0),
        "stride_qh": q.stride(1),
        **_strides(k=k, v=v),
        "num_heads": q.shape[1],
        "num_rows": len(q),
        "rows_each": rows_each,
        "HAS_INVALID": valid is not None,
        **head_sizes(q.shape[2]),
    }


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of batch, heads and tokens, by the names that kernels have for them."""
    strides = {}
    for name, x in tensors.items():
        for index, axis in enumerate("bhn"):
            strides[f"stride_{name}{axis}"] = x.stride(index)
    return strides


def _split(
    segments: Segments, num_heads: int, rows_each: int, tiles: Tiles
) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Return the grid of a kernel that splits the keys, the splits, and what it has to know."""
    num_tiles = triton.cdiv(segments.most_rows * rows_each, tiles.block_q)
    size = segments.keys_per_program(num_heads, num_tiles, tiles.block_k)
    num_splits = max(1, triton.cdiv(segments.most_keys, size))
    grid = len(segments.table) * num_heads, num_tiles * num_splits
    return grid, num_splits, {"num_tiles": num_tiles, "split_size": size}


def _run_forward(
    segments: Segments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    valid: Tensor | None,
    rows_each: int,
    scale: float,
    dropout: tuple[float, int],
) -> None:
    """Write output, log-sum-exp and remainder, for which `results` has memory."""
    num_rows, num_heads, head_dim = q.shape
    if not num_rows:
        return
    out, lse, remainder = results
    tiles = _tiles("forward", q, segments.most_rows * rows_each)
    grid, num_splits, cut = _split(segments, num_heads, rows_each, tiles)
    partial = q.new_empty(num_splits, *q.shape, dtype=torch.float32)
    tops, totals = q.new_empty(2, num_splits, num_rows, num_heads, dtype=torch.float32)
    shared = _shared(q, k, v, valid, segments, rows_each)
    drawn = softmax_arguments(scale, dropout)
    kept_scale = drawn.pop("kept_scale")  # once, where the splits are joined
    forward_kernel[grid](
        q, k, v, partial, tops, totals,
        **shared, **drawn, **cut, **tiles.blocks, **tiles.options,
    )  # fmt: skip
    join_kernel[(num_rows * num_heads,)](
        partial, tops, totals, out, lse, or_none(remainder), num_splits, num_heads, num_rows,
        kept_scale, **head_sizes(head_dim), JOINED=_JOINED, **FUSED_MULTIPLY_ADD,
    )  # fmt: skip


def _run_backward(
    segments: Segments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    valid: Tensor | None,
    rows_each: int,
    scale: float,
    dropout: tuple[float, int],
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_heads, _ = q.shape
    dk, dv = _gradient_of(k), _gradient_of(v)
    if not num_rows:
        return torch.empty_like(q), dk.zero_(), dv.zero_()
    read = (q, k, v, grad, lse, delta)
    arguments = {
        **_shared(q, k, v, valid, segments, rows_each),
        **softmax_arguments(scale, dropout),
        "stride_dor": grad.stride(0),
        "stride_doh": grad.stride(1),
    }
    most_rows = segments.most_rows * rows_each
    tiles = _tiles("queries", q, most_rows)
    grid, num_splits, cut = _split(segments, num_heads, rows_each, tiles)
    partial = q.new_empty(num_splits, *q.shape, dtype=torch.float32)
    backward_queries_kernel[grid](
        *read, partial, **arguments, **cut, **tiles.blocks, **tiles.options
    )
    tiles = _tiles("keys", q, most_rows)
    grid = len(segments.table) * num_heads, triton.cdiv(segments.most_slots, tiles.block_k)
    if segments.most_slots:
        backward_keys_kernel[grid](
            *read, dk, dv, scale=scale, **_strides(dk=dk, dv=dv), **arguments,
            **tiles.blocks, **tiles.options,
        )  # fmt: skip
    return (partial.sum(0) * scale).to(q.dtype), dk, dv


def _num_flops(q: Sequence[int], planned: Sequence[int], rows_each: int, products: int) -> int:
    """Return the flops of so many products of all rows and keys, for torch's counter."""
    return 2 * products * planned[-1] * rows_each * q[1] * q[2]


@register_flop_formula(torch.ops.longhaul.fused_rows)
def _(q: Sequence[int], *given: Any, **_: Any) -> int:
    return _num_flops(q, given[4], given[5], 2)


@register_flop_formula(torch.ops.longhaul.fused_rows_backward)
def _(_grad: Any, q: Sequence[int], *given: Any, **_: Any) -> int:
    return _num_flops(q, given[7], given[8], 7)
