"""Few query rows against many keys, as Triton kernels for GPUs: forward and backward.

What limits them is reading the keys and values, so each is read once for all rows of a tile, and
the keys of a document are split over many programs. Each leaves what a softmax of its keys alone
gives, and a second kernel joins the splits in their order. Going back, the rows' gradients are such
sums too, and there is a program for each tile of keys: no two runs differ by a bit.
Keys and values are [B, H, n, D] with any strides: padded groups as they are, and packed documents
as a batch of one. `segments.py` says which rows read which of them.
Shape letters: R rows, S segments, P splits, H heads, D head dimension.
"""

# What is known when a kernel is compiled has names in capitals, and Triton has no types.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longformer_core.attention.fused.plan import softmax_arguments
from longformer_core.attention.fused.segments import Segment, Segments
from longformer_core.attention.fused.window import (
    _FEW_KEYS,
    _FUSED,
    _LN_2,
    _TO_LOG_2,
    Tiles,
    _at,
    _cut,
    _delta,
    _device_of,
    _is_valid,
    _key_step,
    _or_none,
    _results,
    _rows,
    _sizes,
    _slopes,
    _softmax_step,
    _store_rows,
    _with_unit_stride,
)
from longformer_core.ops.custom_op import fake_of, has_no_gradient, operator

# By kernel, rows of a segment up to, padded head size up to, bytes of a number. `own` are rows,
# but of "keys" keys. Chosen by compiling, like those of fused.py: 16 rows are the least that a
# matrix product takes, and more pay only if there are more.
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
    ("keys", 16, 64, 2): Tiles(64, 16, 4, 1),
    ("keys", 16, 128, 2): Tiles(64, 16, 4, 1),
    ("keys", 16, 64, 4): Tiles(32, 16, 4, 1),
    ("keys", 16, 128, 4): Tiles(32, 16, 8, 1),
    ("keys", 64, 64, 2): Tiles(64, 32, 4, 2),
    ("keys", 64, 128, 2): Tiles(64, 32, 8, 2),
    ("keys", 64, 64, 4): Tiles(32, 16, 4, 1),
    ("keys", 64, 128, 4): Tiles(32, 16, 8, 1),
}
# Splits that are joined at once, and rows of a program that only reads.
_JOINED = 32
_READ = 64

_SEGMENT = tl.constexpr(len(Segment._fields))
# Arguments that change from call to call compile no kernel anew.
_CHANGING = ["num_heads", "num_tiles", "num_rows", "rows_each", "size", "seed", "threshold"]


@triton.jit
def _segment(segments: tl.tensor, num_heads: tl.tensor, rows_each: tl.tensor) -> tl.tensor:
    """Return the segment of this program: first row and last + 1, where its keys are, how many."""
    at = segments + (tl.program_id(0) // num_heads) * _SEGMENT
    first = tl.load(at) * rows_each
    end = first + tl.load(at + 1) * rows_each
    return first, end, tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def _keys(
    k: tl.tensor,
    v: tl.tensor,
    valid: tl.tensor,
    k_token: tl.tensor,
    v_token: tl.tensor,
    first_key: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Load a tile of a segment's keys and values; return slots and flags with them."""
    offsets = tl.arange(0, SIZE)
    slot = first_key + first
    slots = slot + offsets
    is_key = _is_valid(valid, slots, first + offsets < end, HAS_INVALID)
    keys = _rows(_at(k, slot, k_token), offsets, k_token, is_key, HEAD, PADDED, MASKED)
    values = _rows(_at(v, slot, v_token), offsets, v_token, is_key, HEAD, PADDED, MASKED)
    return slots.to(tl.int32), is_key, keys, values


@triton.jit(do_not_specialize=_CHANGING)
def _forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    partial: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    segments: tl.tensor,
    valid: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    num_heads: tl.tensor,
    num_tiles: tl.tensor,
    num_rows: tl.tensor,
    rows_each: tl.tensor,
    size: tl.tensor,
    factor: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
) -> None:
    """Compute maximum, sum and output of a tile of rows over one split of their keys, one head."""
    first, end, batch, first_key, num_keys, _ = _segment(segments, num_heads, rows_each)
    head = tl.program_id(0) % num_heads
    tile, split = tl.program_id(1) % num_tiles, tl.program_id(1) // num_tiles
    first += tile * OWN
    if first >= end:
        return
    k = _at(_at(k, batch, k_batch), head, k_head)
    v = _at(_at(v, batch, v_batch), head, v_head)
    offsets = tl.arange(0, OWN)
    rows = (first + offsets).to(tl.int32)
    is_row = first + offsets < end
    at_q = _at(_at(q, head, q_head), first, q_row)
    queries = _rows(at_q, offsets, q_row, is_row, HEAD, PADDED, True)
    top = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.full([OWN], 0.0, tl.float32)
    acc = tl.full([OWN, PADDED], 0.0, tl.float32)

    low = split * size
    high = tl.minimum(low + size, num_keys.to(tl.int32))
    whole = low + tl.maximum(high - low, 0) // STEP * STEP
    if factor < 0:
        # The unmasked tiles count on it.
        whole = low
    for part in tl.static_range(2):
        if part == 0:
            start, stop = low, whole
        else:
            start, stop = whole, high
        for at in range(start, stop, STEP):
            key_slots, sees, keys, values = _keys(
                k, v, valid, k_token, v_token, first_key, at, high,
                HEAD, PADDED, STEP, HAS_INVALID, part == 1 or HAS_INVALID,
            )  # fmt: skip
            top, total, acc = _softmax_step(
                top, total, acc, queries, keys, values, sees[None, :], rows, key_slots, factor,
                head, seed, threshold, HAS_DROPOUT, part == 1 or HAS_INVALID,
            )  # fmt: skip

    # [P, R, H]
    slot = (split.to(tl.int64) * num_rows + first) * num_heads + head
    tl.store(tops + slot + offsets * num_heads, top, mask=is_row)
    tl.store(totals + slot + offsets * num_heads, total, mask=is_row)
    _store_rows(partial + slot * HEAD, acc, offsets, num_heads * HEAD, is_row, HEAD, PADDED)


@triton.jit(do_not_specialize=["num_splits", "num_heads", "num_rows"])
def _join(
    partial: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    remainder: tl.tensor | None,
    num_splits: tl.tensor,
    num_heads: tl.tensor,
    num_rows: tl.tensor,
    kept_scale: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    JOINED: tl.constexpr,
) -> None:
    """Make output and log-sum-exp of one row and head from those of the splits.

    And, where there is memory for it, what the output loses by rounding.
    """
    # Row and head together; so they lie in `partial`, too.
    row = tl.program_id(0)
    columns = tl.arange(0, PADDED)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.full([1], 0.0, tl.float32)
    acc = tl.full([PADDED], 0.0, tl.float32)
    for at in range(0, num_splits, JOINED):
        splits = at + tl.arange(0, JOINED)
        is_split = splits < num_splits
        slots = splits.to(tl.int64) * (num_rows * num_heads) + row
        some_tops = tl.load(tops + slots, mask=is_split, other=float("-inf"))
        some_totals = tl.load(totals + slots, mask=is_split, other=0.0)
        some = _rows(partial, slots, HEAD, is_split, HEAD, PADDED, True)
        new = tl.maximum(top, tl.max(some_tops, 0))
        # A row that has seen no key has no finite maximum: minus infinity less that is NaN.
        pivot = tl.where(new == float("-inf"), 0.0, new)
        old, weights = tl.exp2(top - pivot), tl.exp2(some_tops - pivot)
        total = total * old + tl.sum(some_totals * weights, 0)
        acc = acc * old + tl.sum(some * weights[:, None], 0)
        top = new
    sees_any = total > 0
    total = tl.where(sees_any, total, 1.0)
    acc = tl.where(sees_any, acc * (kept_scale / total), 0.0)
    sums = tl.where(sees_any, (top + tl.log2(total)) * _LN_2, float("-inf"))
    at_out = row.to(tl.int64) * HEAD + columns
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + at_out, rounded, mask=columns < HEAD)
    if remainder is not None:
        lost = acc - rounded.to(tl.float32)
        tl.store(remainder + at_out, lost.to(remainder.dtype.element_ty), mask=columns < HEAD)
    # [H, R]
    at_lse = _at(lse, row % num_heads, num_rows) + row // num_heads
    tl.store(at_lse + tl.arange(0, 1), sums)


@triton.jit
def _row_side(
    q: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    q_row: tl.tensor,
    grad_row: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """Load what the backward pass needs of a tile of rows.

    The log-sum-exp comes in powers of 2, infinite for rows without keys: their probabilities are 0.
    """
    offsets = tl.arange(0, SIZE)
    is_row = first + offsets < end
    queries = _rows(_at(q, first, q_row), offsets, q_row, is_row, HEAD, PADDED, True)
    grads = _rows(_at(grad, first, grad_row), offsets, grad_row, is_row, HEAD, PADDED, True)
    sums = tl.load(lse + first + offsets, mask=is_row, other=float("-inf"))
    sums = tl.where(sums == float("-inf"), float("inf"), sums * _TO_LOG_2)
    deltas = tl.load(delta + first + offsets, mask=is_row, other=0.0)
    return (first + offsets).to(tl.int32), is_row, queries, grads, sums, deltas


@triton.jit(do_not_specialize=_CHANGING)
def _backward_queries(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    partial: tl.tensor,
    segments: tl.tensor,
    valid: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    grad_row: tl.tensor,
    grad_head: tl.tensor,
    num_heads: tl.tensor,
    num_tiles: tl.tensor,
    num_rows: tl.tensor,
    rows_each: tl.tensor,
    size: tl.tensor,
    factor: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    kept_scale: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
) -> None:
    """Compute what one split of the keys gives to the gradient of a tile of rows, one head."""
    first, end, batch, first_key, num_keys, _ = _segment(segments, num_heads, rows_each)
    head = tl.program_id(0) % num_heads
    tile, split = tl.program_id(1) % num_tiles, tl.program_id(1) // num_tiles
    first += tile * OWN
    if first >= end:
        return
    k = _at(_at(k, batch, k_batch), head, k_head)
    v = _at(_at(v, batch, v_batch), head, v_head)
    rows, is_row, queries, grads, sums, deltas = _row_side(
        _at(q, head, q_head), _at(grad, head, grad_head), _at(lse, head, num_rows),
        _at(delta, head, num_rows), q_row, grad_row, first, end, HEAD, PADDED, OWN,
    )  # fmt: skip
    acc = tl.full([OWN, PADDED], 0.0, tl.float32)

    low = split * size
    high = tl.minimum(low + size, num_keys.to(tl.int32))
    whole = low + tl.maximum(high - low, 0) // STEP * STEP
    for part in tl.static_range(2):
        if part == 0:
            start, stop = low, whole
        else:
            start, stop = whole, high
        for at in range(start, stop, STEP):
            key_slots, sees, keys, values = _keys(
                k, v, valid, k_token, v_token, first_key, at, high,
                HEAD, PADDED, STEP, HAS_INVALID, part == 1 or HAS_INVALID,
            )  # fmt: skip
            slopes = _slopes(
                queries, grads, sums, deltas, keys, values, sees[None, :], rows, key_slots,
                factor, head, seed, threshold, kept_scale, HAS_DROPOUT, part == 1 or HAS_INVALID,
            )[1]  # fmt: skip
            acc = tl.dot(slopes.to(keys.dtype), keys, acc, input_precision="ieee")

    slot = (split.to(tl.int64) * num_rows + first) * num_heads + head
    offsets = tl.arange(0, OWN)
    _store_rows(partial + slot * HEAD, acc, offsets, num_heads * HEAD, is_row, HEAD, PADDED)


@triton.jit(do_not_specialize=_CHANGING)
def _backward_keys(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    segments: tl.tensor,
    valid: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    grad_row: tl.tensor,
    grad_head: tl.tensor,
    dk_batch: tl.tensor,
    dk_head: tl.tensor,
    dk_token: tl.tensor,
    dv_batch: tl.tensor,
    dv_head: tl.tensor,
    dv_token: tl.tensor,
    num_heads: tl.tensor,
    num_rows: tl.tensor,
    rows_each: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    kept_scale: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
) -> None:
    """Compute the gradients of one tile of keys and values, one head; zeros for padding."""
    row, end, batch, first_key, num_keys, num_slots = _segment(segments, num_heads, rows_each)
    head = tl.program_id(0) % num_heads
    first = tl.program_id(1) * OWN
    if first >= num_slots:
        return
    k = _at(_at(k, batch, k_batch), head, k_head)
    v = _at(_at(v, batch, v_batch), head, v_head)
    key_slots, is_key, keys, values = _keys(
        k, v, valid, k_token, v_token, first_key, first, num_keys,
        HEAD, PADDED, OWN, HAS_INVALID, True,
    )  # fmt: skip
    q, grad = _at(q, head, q_head), _at(grad, head, grad_head)
    lse, delta = _at(lse, head, num_rows), _at(delta, head, num_rows)
    acc_k = tl.full([OWN, PADDED], 0.0, tl.float32)
    acc_v = tl.full([OWN, PADDED], 0.0, tl.float32)
    for at in range(0, (end - row).to(tl.int32), STEP):
        rows, is_row, queries, grads, sums, deltas = _row_side(
            q, grad, lse, delta, q_row, grad_row, row + at, end, HEAD, PADDED, STEP
        )
        acc_k, acc_v = _key_step(
            acc_k, acc_v, keys, values, queries, grads, sums, deltas,
            is_row[None, :] & is_key[:, None], rows, key_slots,
            factor, head, seed, threshold, kept_scale, HAS_DROPOUT, True,
        )  # fmt: skip

    offsets = tl.arange(0, OWN)
    in_segment = first + offsets < num_slots
    slot = first_key + first
    dk = _at(_at(_at(dk, batch, dk_batch), head, dk_head), slot, dk_token)
    dv = _at(_at(_at(dv, batch, dv_batch), head, dv_head), slot, dv_token)
    _store_rows(dk, acc_k * scale, offsets, dk_token, in_segment, HEAD, PADDED)
    _store_rows(dv, acc_v, offsets, dv_token, in_segment, HEAD, PADDED)


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
    q, k, v = (_with_unit_stride(x) for x in (q, k, v))
    results = _results(q, needs_gradient=needs_gradient)
    with _device_of(q):
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
    grad, q, k, v = (_with_unit_stride(x) for x in (grad, q, k, v))
    with _device_of(q):
        delta = _deltas(grad, out, lse, remainder)
        dtype = q.dtype
        if segments.most_keys <= _FEW_KEYS:
            q, k, v, grad = (x.float() for x in (q, k, v, grad))
        read = (q, k, v, grad, lse, delta)
        grads = _run_backward(segments, *read, valid, rows_each, scale, (dropout_p, seed))
        dq, dk, dv = (x.to(dtype) for x in grads)
        return dq, dk, dv


@fake_of(_attend)
def _(q: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q, needs_gradient=given[-1])


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
    x = _with_unit_stride(x)
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
        "segments": segments.table,
        "valid": valid,
        "q_row": q.stride(0),
        "q_head": q.stride(1),
        **_strides(k=k, v=v),
        "num_heads": q.shape[1],
        "num_rows": len(q),
        "rows_each": rows_each,
        "HAS_INVALID": valid is not None,
        **_sizes(q.shape[2]),
    }


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of batch, heads and tokens, by the names that kernels have for them."""
    strides = {}
    for name, x in tensors.items():
        for index, axis in enumerate(("batch", "head", "token")):
            strides[f"{name}_{axis}"] = x.stride(index)
    return strides


def _split(
    segments: Segments, num_heads: int, rows_each: int, tiles: Tiles
) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Return the grid of a kernel that splits the keys, the splits, and what it has to know."""
    num_tiles = triton.cdiv(segments.most_rows * rows_each, tiles.own)
    size = segments.keys_per_program(num_heads, num_tiles, tiles.step)
    num_splits = max(1, triton.cdiv(segments.most_keys, size))
    grid = len(segments.table) * num_heads, num_tiles * num_splits
    return grid, num_splits, {"num_tiles": num_tiles, "size": size}


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
    _forward[grid](
        q, k, v, partial, tops, totals,
        **shared, **drawn, **cut, **_cut(tiles),
    )  # fmt: skip
    _join[(num_rows * num_heads,)](
        partial, tops, totals, out, lse, _or_none(remainder), num_splits, num_heads, num_rows,
        kept_scale, **_sizes(head_dim), JOINED=_JOINED, **_FUSED,
    )  # fmt: skip


def _deltas(grad: Tensor, out: Tensor, lse: Tensor, remainder: Tensor) -> Tensor:
    """Return the sum of each row of output times gradient, [H, R] float32."""
    num_rows, num_heads, head_dim = out.shape
    delta = torch.empty_like(lse)
    if num_rows:
        _delta[(triton.cdiv(num_rows, _READ), num_heads)](
            out, _or_none(remainder), grad, delta, num_heads * head_dim, *grad.stride()[:2],
            num_rows, **_sizes(head_dim), OWN=_READ, **_FUSED,
        )  # fmt: skip
    return delta


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
        "grad_row": grad.stride(0),
        "grad_head": grad.stride(1),
    }
    most_rows = segments.most_rows * rows_each
    tiles = _tiles("queries", q, most_rows)
    grid, num_splits, cut = _split(segments, num_heads, rows_each, tiles)
    partial = q.new_empty(num_splits, *q.shape, dtype=torch.float32)
    _backward_queries[grid](*read, partial, **arguments, **cut, **_cut(tiles))
    tiles = _tiles("keys", q, most_rows)
    grid = len(segments.table) * num_heads, triton.cdiv(segments.most_slots, tiles.own)
    if segments.most_slots:
        _backward_keys[grid](
            *read, dk, dv, scale=scale, **_strides(dk=dk, dv=dv), **arguments, **_cut(tiles)
        )
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
