"""The Triton kernels of few query rows against many keys; what calls them: `few_queries.py`.

Shape letters: R rows, P splits, H heads, D head dimension, filled up to a power of 2. Names: see
`common.py`.
"""

# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

from longformer_core.attention.fused.common import (
    LN_2,
    at,
    key_step,
    load_lse,
    load_rows,
    only_valid,
    score_gradients,
    softmax_step,
    store_rows,
)
from longformer_core.attention.fused.segments import Segment

_SEGMENT = tl.constexpr(len(Segment._fields))
# Arguments that change from call to call compile no kernel anew.
_CHANGING = ["num_heads", "num_rows", "rows_each", "seed", "threshold"]


@triton.jit
def _load_segment(Segments, num_heads, rows_each):
    """Return the segment of this program: first row and last + 1, where its keys are, how many."""
    Row = Segments + (tl.program_id(0) // num_heads) * _SEGMENT
    first = tl.load(Row) * rows_each
    end = first + tl.load(Row + 1) * rows_each
    return first, end, tl.load(Row + 2), tl.load(Row + 3), tl.load(Row + 4), tl.load(Row + 5)


@triton.jit
def _load_keys(
    K, V, Valid, stride_kn, stride_vn, first_key, first, end,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_INVALID: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load a tile of a segment's keys and values; return slots and flags with them."""
    offsets = tl.arange(0, BLOCK_K)
    slot = first_key + first
    slots = slot + offsets
    is_key = only_valid(Valid, slots, first + offsets < end, HAS_INVALID)
    k = load_rows(at(K, slot, stride_kn), offsets, stride_kn, is_key, HEAD_DIM, BLOCK_D, MASKED)
    v = load_rows(at(V, slot, stride_vn), offsets, stride_vn, is_key, HEAD_DIM, BLOCK_D, MASKED)
    return slots.to(tl.int32), is_key, k, v


@triton.jit
def _load_queries(
    Q, dO, Lse, Delta, stride_qr, stride_dor, first, end,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Load what the backward pass needs of a tile of rows."""
    offsets = tl.arange(0, BLOCK_Q)
    is_row = first + offsets < end
    q = load_rows(at(Q, first, stride_qr), offsets, stride_qr, is_row, HEAD_DIM, BLOCK_D, True)
    do = load_rows(at(dO, first, stride_dor), offsets, stride_dor, is_row, HEAD_DIM, BLOCK_D, True)
    lse = load_lse(Lse + first, offsets, is_row)
    delta = tl.load(Delta + first + offsets, mask=is_row, other=0.0)
    return (first + offsets).to(tl.int32), is_row, q, do, lse, delta


@triton.jit(do_not_specialize=[*_CHANGING, "num_tiles", "split_size"])
def forward_kernel(
    Q, K, V, Part, Part_m, Part_l, Segments, Valid,
    stride_qr, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    num_heads, num_tiles, num_rows, rows_each, split_size, scale_log2, seed, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_INVALID: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Compute maximum, sum and output of a tile of rows over one split of their keys, one head.

    Shapes: Part [P, R, H, D]; Part_m, Part_l [P, R, H].
    """
    first, end, batch, first_key, num_keys, _ = _load_segment(Segments, num_heads, rows_each)
    head = tl.program_id(0) % num_heads
    tile, split = tl.program_id(1) % num_tiles, tl.program_id(1) // num_tiles
    first += tile * BLOCK_Q
    if first >= end:
        return
    K = at(at(K, batch, stride_kb), head, stride_kh)
    V = at(at(V, batch, stride_vb), head, stride_vh)
    offsets = tl.arange(0, BLOCK_Q)
    rows = (first + offsets).to(tl.int32)
    is_row = first + offsets < end
    Q = at(at(Q, head, stride_qh), first, stride_qr)
    q = load_rows(Q, offsets, stride_qr, is_row, HEAD_DIM, BLOCK_D, True)  # [BLOCK_Q, D]
    m_i = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l_i = tl.full([BLOCK_Q], 0.0, tl.float32)
    acc = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)

    low = split * split_size
    high = tl.minimum(low + split_size, num_keys.to(tl.int32))
    whole = low + tl.maximum(high - low, 0) // BLOCK_K * BLOCK_K
    if scale_log2 < 0:
        # The unmasked tiles count on it.
        whole = low
    for part in tl.static_range(2):
        if part == 0:
            part_start, part_end = low, whole
        else:
            part_start, part_end = whole, high
        for start in range(part_start, part_end, BLOCK_K):
            key_slots, sees, k, v = _load_keys(
                K, V, Valid, stride_kn, stride_vn, first_key, start, high,
                HEAD_DIM, BLOCK_D, BLOCK_K, HAS_INVALID, part == 1 or HAS_INVALID,
            )  # fmt: skip
            m_i, l_i, acc = softmax_step(
                m_i, l_i, acc, q, k, v, sees[None, :], rows, key_slots, scale_log2,
                head, seed, threshold, HAS_DROPOUT, part == 1 or HAS_INVALID,
            )  # fmt: skip

    slot = (split.to(tl.int64) * num_rows + first) * num_heads + head
    tl.store(Part_m + slot + offsets * num_heads, m_i, mask=is_row)
    tl.store(Part_l + slot + offsets * num_heads, l_i, mask=is_row)
    Part += slot * HEAD_DIM
    store_rows(Part, acc, offsets, num_heads * HEAD_DIM, is_row, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_splits", "num_heads", "num_rows"])
def join_kernel(
    Part, Part_m, Part_l, Out, Lse, Remainder, num_splits, num_heads, num_rows, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Make output and log-sum-exp of one row and head from those of the splits.

    And, where there is memory for it, what the output loses by rounding.
    Shapes: Part [P, R, H, D]; Part_m, Part_l [P, R, H]; Out, Remainder [R, H, D]; Lse [H, R].
    """
    row = tl.program_id(0)  # of [R, H]
    columns = tl.arange(0, BLOCK_D)
    m_i = tl.full([1], float("-inf"), tl.float32)
    l_i = tl.full([1], 0.0, tl.float32)
    acc = tl.full([BLOCK_D], 0.0, tl.float32)
    for start in range(0, num_splits, JOINED):
        splits = start + tl.arange(0, JOINED)
        is_split = splits < num_splits
        slots = splits.to(tl.int64) * (num_rows * num_heads) + row
        part_m = tl.load(Part_m + slots, mask=is_split, other=float("-inf"))  # [JOINED]
        part_l = tl.load(Part_l + slots, mask=is_split, other=0.0)  # [JOINED]
        part = load_rows(Part, slots, HEAD_DIM, is_split, HEAD_DIM, BLOCK_D, True)  # [JOINED, D]
        m_new = tl.maximum(m_i, tl.max(part_m, 0))
        # A row that has seen no key has no finite maximum: minus infinity less that is NaN.
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, part_alpha = tl.exp2(m_i - pivot), tl.exp2(part_m - pivot)
        l_i = l_i * alpha + tl.sum(part_l * part_alpha, 0)
        acc = acc * alpha + tl.sum(part * part_alpha[:, None], 0)
        m_i = m_new
    sees_any = l_i > 0
    l_i = tl.where(sees_any, l_i, 1.0)
    acc = tl.where(sees_any, acc * (kept_scale / l_i), 0.0)
    lse = tl.where(sees_any, (m_i + tl.log2(l_i)) * LN_2, float("-inf"))
    at_out = row.to(tl.int64) * HEAD_DIM + columns
    rounded = acc.to(Out.dtype.element_ty)
    tl.store(Out + at_out, rounded, mask=columns < HEAD_DIM)
    if Remainder is not None:
        lost = acc - rounded.to(tl.float32)
        lost = lost.to(Remainder.dtype.element_ty)
        tl.store(Remainder + at_out, lost, mask=columns < HEAD_DIM)
    at_lse = at(Lse, row % num_heads, num_rows) + row // num_heads
    tl.store(at_lse + tl.arange(0, 1), lse)


@triton.jit(do_not_specialize=[*_CHANGING, "num_tiles", "split_size"])
def backward_queries_kernel(
    Q, K, V, dO, Lse, Delta, Part_dQ, Segments, Valid,
    stride_qr, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dor, stride_doh,
    num_heads, num_tiles, num_rows, rows_each, split_size, scale_log2, seed, threshold, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_INVALID: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Compute what one split of the keys gives to the gradient of a tile of rows, one head.

    Shapes: Part_dQ [P, R, H, D].
    """
    first, end, batch, first_key, num_keys, _ = _load_segment(Segments, num_heads, rows_each)
    head = tl.program_id(0) % num_heads
    tile, split = tl.program_id(1) % num_tiles, tl.program_id(1) // num_tiles
    first += tile * BLOCK_Q
    if first >= end:
        return
    K = at(at(K, batch, stride_kb), head, stride_kh)
    V = at(at(V, batch, stride_vb), head, stride_vh)
    Q, dO = at(Q, head, stride_qh), at(dO, head, stride_doh)
    Lse, Delta = at(Lse, head, num_rows), at(Delta, head, num_rows)
    rows, is_row, q, do, lse, delta = _load_queries(
        Q, dO, Lse, Delta, stride_qr, stride_dor, first, end, HEAD_DIM, BLOCK_D, BLOCK_Q
    )
    dq = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)

    low = split * split_size
    high = tl.minimum(low + split_size, num_keys.to(tl.int32))
    whole = low + tl.maximum(high - low, 0) // BLOCK_K * BLOCK_K
    for part in tl.static_range(2):
        if part == 0:
            part_start, part_end = low, whole
        else:
            part_start, part_end = whole, high
        for start in range(part_start, part_end, BLOCK_K):
            key_slots, sees, k, v = _load_keys(
                K, V, Valid, stride_kn, stride_vn, first_key, start, high,
                HEAD_DIM, BLOCK_D, BLOCK_K, HAS_INVALID, part == 1 or HAS_INVALID,
            )  # fmt: skip
            _p, dS = score_gradients(
                q, do, lse, delta, k, v, sees[None, :], rows, key_slots,
                scale_log2, head, seed, threshold, kept_scale, HAS_DROPOUT,
                part == 1 or HAS_INVALID,
            )  # fmt: skip
            dq = tl.dot(dS.to(k.dtype), k, dq, input_precision="ieee")

    slot = (split.to(tl.int64) * num_rows + first) * num_heads + head
    offsets = tl.arange(0, BLOCK_Q)
    Part_dQ += slot * HEAD_DIM
    store_rows(Part_dQ, dq, offsets, num_heads * HEAD_DIM, is_row, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_CHANGING)
def backward_keys_kernel(
    Q, K, V, dO, Lse, Delta, dK, dV, Segments, Valid,
    stride_qr, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dor, stride_doh,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    num_heads, num_rows, rows_each, scale, scale_log2, seed, threshold, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_INVALID: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile of keys and values, one head; zeros for padding."""
    row, end, batch, first_key, num_keys, num_slots = _load_segment(Segments, num_heads, rows_each)
    head = tl.program_id(0) % num_heads
    first = tl.program_id(1) * BLOCK_K
    if first >= num_slots:
        return
    K = at(at(K, batch, stride_kb), head, stride_kh)
    V = at(at(V, batch, stride_vb), head, stride_vh)
    key_slots, is_key, k, v = _load_keys(
        K, V, Valid, stride_kn, stride_vn, first_key, first, num_keys,
        HEAD_DIM, BLOCK_D, BLOCK_K, HAS_INVALID, True,
    )  # fmt: skip
    Q, dO = at(Q, head, stride_qh), at(dO, head, stride_doh)
    Lse, Delta = at(Lse, head, num_rows), at(Delta, head, num_rows)
    dk = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    dv = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    for start in range(0, (end - row).to(tl.int32), BLOCK_Q):
        rows, is_row, q, do, lse, delta = _load_queries(
            Q, dO, Lse, Delta, stride_qr, stride_dor, row + start, end, HEAD_DIM, BLOCK_D, BLOCK_Q
        )
        sees = is_row[None, :] & is_key[:, None]  # [BLOCK_K, BLOCK_Q]
        dk, dv = key_step(
            dk, dv, k, v, q, do, lse, delta, sees, rows, key_slots,
            scale_log2, head, seed, threshold, kept_scale, HAS_DROPOUT, True,
        )  # fmt: skip

    offsets = tl.arange(0, BLOCK_K)
    in_segment = first + offsets < num_slots
    slot = first_key + first
    dK = at(at(at(dK, batch, stride_dkb), head, stride_dkh), slot, stride_dkn)
    dV = at(at(at(dV, batch, stride_dvb), head, stride_dvh), slot, stride_dvn)
    store_rows(dK, dk * scale, offsets, stride_dkn, in_segment, HEAD_DIM, BLOCK_D)
    store_rows(dV, dv, offsets, stride_dvn, in_segment, HEAD_DIM, BLOCK_D)
