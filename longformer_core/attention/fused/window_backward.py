"""The backward pass of window attention as Triton kernels; what calls them: `window.py`.

There is a program for each tile of queries (dQ), for each tile of keys (dK, dV), and for each chunk
of global keys and part of the queries; the last ones' sums are added up in one order, so no two
runs differ by a bit.
Shape letters: D head dimension, filled up to a power of 2. Names: see `common.py`.
"""

# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

from longformer_core.attention.fused.common import (
    at,
    is_extra,
    is_near,
    key_step,
    load_globals,
    load_item,
    load_keys,
    load_queries,
    load_rows,
    score_gradients,
    span_of,
    store_rows,
    whole_tiles,
)

# Arguments that change from call to call compile no kernel anew.
_CHANGING = ["num_tokens", "radius", "seed", "threshold"]


@triton.jit
def _query_step(
    dq, mean, excess, q, do, lse, delta, k, v, sees, query_slots, key_slots,
    scale_log2, head, seed, threshold, kept_scale,
    HAS_DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what keys give to the gradient of queries, the mean key, and the sum of dS.

    Shapes: dq, mean, q, do [BLOCK_Q, D]; excess, lse, delta [BLOCK_Q]; k, v [block_k, D].
    """
    p, dS = score_gradients(
        q, do, lse, delta, k, v, sees, query_slots, key_slots,
        scale_log2, head, seed, threshold, kept_scale, HAS_DROPOUT, MASKED,
    )  # fmt: skip
    excess += tl.sum(dS, 1)
    if k.dtype == tl.float32:
        mean = tl.dot(p, k, mean, input_precision="ieee")
    dq = tl.dot(dS.to(k.dtype), k, dq, input_precision="ieee")
    return dq, mean, excess


@triton.jit(do_not_specialize=_CHANGING)
def backward_queries_kernel(
    Q, K, V, dO, Lse, Delta, dQ, Items, Heads, Globals, Valid,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    stride_ot, num_tokens, radius, scale, scale_log2, seed, threshold, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_INVALID: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of one tile of queries and one head.

    In truth the dS of a query, the gradients of its scores, have the sum 0; what the sum is, is the
    error of `Delta`. It is taken off `Delta`, for the keys' gradients; and in 32 bits, where a
    product more is no matter, off the queries' own.
    """
    base, length, first, low, high, global_first, global_end = load_item(Items, tl.program_id(0))
    head = tl.load(Heads + tl.program_id(1))
    Q, K, V = at(Q, head, stride_qh), at(K, head, stride_kh), at(V, head, stride_vh)
    dO = at(dO, head, stride_doh)
    Lse, Delta = at(Lse, head, num_tokens), at(Delta, head, num_tokens)
    query, slots, is_query, q, do, lse, delta = load_queries(
        Q, dO, Lse, Delta, Valid, stride_qt, stride_dot, base, length, first,
        HEAD_DIM, BLOCK_D, BLOCK_Q, DILATION, HAS_INVALID, True,
    )  # fmt: skip
    dq = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)
    mean = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)
    excess = tl.full([BLOCK_Q], 0.0, tl.float32)

    if BLOCK_G > 0:
        for start in range(global_first, global_end, BLOCK_G):
            key_slots, is_key, k, v = load_globals(
                K, V, Globals, stride_kt, stride_vt, start, global_end, HEAD_DIM, BLOCK_D, BLOCK_G
            )
            distance = slots[:, None] - key_slots[None, :]  # [BLOCK_Q, BLOCK_G]
            sees = is_key[None, :] & is_extra(distance, radius, DILATION, CAUSAL)
            dq, mean, excess = _query_step(
                dq, mean, excess, q, do, lse, delta, k, v, sees, slots, key_slots,
                scale_log2, head, seed, threshold, kept_scale, HAS_DROPOUT, True,
            )  # fmt: skip

    last = tl.minimum(first + BLOCK_Q, length) - 1
    right = 0 if CAUSAL else radius
    begin, end = whole_tiles(first, last, length, low, high, radius, right, BLOCK_K)
    for part in tl.static_range(3):
        part_start, part_end = span_of(part, low, begin, end, high)
        for start in range(part_start, part_end, BLOCK_K):
            key, key_slots, is_key, k, v = load_keys(
                K, V, Valid, stride_kt, stride_vt, base, length, start,
                HEAD_DIM, BLOCK_D, BLOCK_K, DILATION, HAS_INVALID, part != 1 or HAS_INVALID,
            )  # fmt: skip
            sees = is_key[None, :]
            if part != 1:
                sees = sees & is_near(query[:, None] - key[None, :], radius, CAUSAL)
            dq, mean, excess = _query_step(
                dq, mean, excess, q, do, lse, delta, k, v, sees, slots, key_slots,
                scale_log2, head, seed, threshold, kept_scale, HAS_DROPOUT,
                part != 1 or HAS_INVALID,
            )  # fmt: skip

    rows = tl.arange(0, BLOCK_Q) * DILATION
    if q.dtype == tl.float32:
        dq -= excess[:, None] * mean
    tl.store(Delta + slots, delta + excess, mask=is_query)
    dQ = at(dQ, base + first * DILATION, stride_ot) + head * HEAD_DIM
    in_tile = first + tl.arange(0, BLOCK_Q) < length
    store_rows(dQ, dq * scale, rows, stride_ot, in_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_CHANGING)
def backward_keys_kernel(
    Q, K, V, dO, Lse, Delta, dK, dV, Items, Heads, Ranks, Global_dK, Global_dV, Valid,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    stride_ot, num_tokens, radius, scale, scale_log2, seed, threshold, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_GLOBALS: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_INVALID: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile of keys and values and one head.

    Through the band; what global keys got from elsewhere is read, and added before rounding.
    """
    base, length, first, low, high, _, _ = load_item(Items, tl.program_id(0))
    head = tl.load(Heads + tl.program_id(1))
    Q, K, V = at(Q, head, stride_qh), at(K, head, stride_kh), at(V, head, stride_vh)
    dO = at(dO, head, stride_doh)
    Lse, Delta = at(Lse, head, num_tokens), at(Delta, head, num_tokens)
    key, key_slots, is_key, k, v = load_keys(
        K, V, Valid, stride_kt, stride_vt, base, length, first,
        HEAD_DIM, BLOCK_D, BLOCK_K, DILATION, HAS_INVALID, True,
    )  # fmt: skip
    in_tile = key < length
    if HAS_GLOBALS:
        rank = tl.load(Ranks + key_slots, mask=in_tile, other=-1)
        row, is_global = rank.to(tl.int64), rank >= 0
        at_dk, at_dv = Global_dK + head * HEAD_DIM, Global_dV + head * HEAD_DIM
        dk = load_rows(at_dk, row, stride_ot, is_global, HEAD_DIM, BLOCK_D, True)  # [BLOCK_K, D]
        dv = load_rows(at_dv, row, stride_ot, is_global, HEAD_DIM, BLOCK_D, True)  # [BLOCK_K, D]
    else:
        dk = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
        dv = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)

    last = tl.minimum(first + BLOCK_K, length) - 1
    left = 0 if CAUSAL else radius
    begin, end = whole_tiles(first, last, length, low, high, left, radius, BLOCK_Q)
    for part in tl.static_range(3):
        part_start, part_end = span_of(part, low, begin, end, high)
        for start in range(part_start, part_end, BLOCK_Q):
            query, slots, is_query, q, do, lse, delta = load_queries(
                Q, dO, Lse, Delta, Valid, stride_qt, stride_dot, base, length, start,
                HEAD_DIM, BLOCK_D, BLOCK_Q, DILATION, HAS_INVALID, part != 1 or HAS_INVALID,
            )  # fmt: skip
            sees = is_query[None, :] & is_key[:, None]  # [BLOCK_K, BLOCK_Q]
            if part != 1:
                sees = sees & is_near(query[None, :] - key[:, None], radius, CAUSAL)
            dk, dv = key_step(
                dk, dv, k, v, q, do, lse, delta, sees, slots, key_slots,
                scale_log2, head, seed, threshold, kept_scale, HAS_DROPOUT,
                part != 1 or HAS_INVALID,
            )  # fmt: skip

    rows = tl.arange(0, BLOCK_K) * DILATION
    slot = base + first * DILATION
    dK, dV = at(dK, slot, stride_ot) + head * HEAD_DIM, at(dV, slot, stride_ot) + head * HEAD_DIM
    store_rows(dK, dk * scale, rows, stride_ot, in_tile, HEAD_DIM, BLOCK_D)
    store_rows(dV, dv, rows, stride_ot, in_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_CHANGING)
def backward_globals_kernel(
    Q, K, V, dO, Lse, Delta, Part_dK, Part_dV, Items, Heads, Globals, Valid,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    stride_ot, num_tokens, radius, scale_log2, seed, threshold, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr,
    DILATION: tl.constexpr, CAUSAL: tl.constexpr, HAS_INVALID: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Sum what a part of a document's queries gives to a chunk of its global keys, one head."""
    base, _, low, high, global_first, global_end, row = load_item(Items, tl.program_id(0))
    head = tl.load(Heads + tl.program_id(1))
    Q, K, V = at(Q, head, stride_qh), at(K, head, stride_kh), at(V, head, stride_vh)
    dO = at(dO, head, stride_doh)
    Lse, Delta = at(Lse, head, num_tokens), at(Delta, head, num_tokens)
    key_slots, is_key, k, v = load_globals(
        K, V, Globals, stride_kt, stride_vt, global_first, global_end, HEAD_DIM, BLOCK_D, BLOCK_G
    )
    dk = tl.full([BLOCK_G, BLOCK_D], 0.0, tl.float32)
    dv = tl.full([BLOCK_G, BLOCK_D], 0.0, tl.float32)
    for start in range(low, high, BLOCK_Q):
        _index, slots, is_query, q, do, lse, delta = load_queries(
            Q, dO, Lse, Delta, Valid, stride_qt, stride_dot, base, high, start,
            HEAD_DIM, BLOCK_D, BLOCK_Q, 1, HAS_INVALID, True,
        )  # fmt: skip
        distance = slots[None, :] - key_slots[:, None]  # [BLOCK_G, BLOCK_Q]
        sees = is_query[None, :] & is_extra(distance, radius, DILATION, CAUSAL)
        dk, dv = key_step(
            dk, dv, k, v, q, do, lse, delta, sees, slots, key_slots,
            scale_log2, head, seed, threshold, kept_scale, HAS_DROPOUT, True,
        )  # fmt: skip
    rows = tl.arange(0, BLOCK_G)
    at_dk, at_dv = at(Part_dK, row, stride_ot), at(Part_dV, row, stride_ot)
    store_rows(at_dk + head * HEAD_DIM, dk, rows, stride_ot, is_key, HEAD_DIM, BLOCK_D)
    store_rows(at_dv + head * HEAD_DIM, dv, rows, stride_ot, is_key, HEAD_DIM, BLOCK_D)


@triton.jit
def sum_parts_kernel(Part, Total, Table, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the rows that one global key got from the parts of its document, in their order."""
    key = tl.program_id(0)
    Row = Table + key * 4
    row, step, count = tl.load(Row), tl.load(Row + 1), tl.load(Row + 2)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    acc = tl.full([BLOCK], 0.0, tl.float32)
    for part in range(count):
        acc += tl.load(at(Part, row + part * step, SIZE) + columns, mask=mask, other=0.0)
    tl.store(at(Total, key, SIZE) + columns, acc, mask=mask)
