"""The forward pass of window attention as a Triton kernel; what calls it: `window.py`.

Shape letters: D head dimension, filled up to a power of 2. Names: see `common.py`.
"""

# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

from longformer_core.attention.fused.common import (
    LN_2,
    at,
    is_extra,
    is_near,
    load_globals,
    load_item,
    load_keys,
    load_rows,
    only_valid,
    softmax_step,
    span_of,
    store_rows,
    whole_tiles,
)


@triton.jit
def _place(pair, num_items, num_heads, GROUP: tl.constexpr):
    """Return which item and which of the heads a pair is.

    Items come in groups, and a group with each head before the next: so the longest documents come
    first with all their heads, their tiles cost the most, and what programs are given in turns
    differs by about one tile. Of a group and head, neighbouring pairs are neighbouring tiles, which
    read the same keys at the same time.
    """
    first = pair // (GROUP * num_heads) * GROUP
    size = tl.minimum(num_items - first, GROUP)
    rest = pair - first * num_heads
    return first + rest % size, rest // size


# Arguments that change from call to call compile no kernel anew.
@triton.jit(
    do_not_specialize=["num_items", "num_heads", "num_tokens", "radius", "seed", "threshold"]
)
def forward_kernel(
    Q, K, V, Out, Lse, Remainder, Items, Heads, Globals, Valid,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
    num_items, num_heads, num_tokens, radius, scale_log2, seed, threshold, kept_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr, GROUP: tl.constexpr, DILATION: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_INVALID: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Compute output and log-sum-exp of tiles of queries, for one head each.

    And, where there is memory for it, what the output loses by rounding. There are as many programs
    as the GPU holds at once, and each walks over pairs of tile and head as `_place` orders them.
    """
    num_pairs = num_items * num_heads
    # What does not change within the loop is computed again each time: it would cost 20 to 70
    # registers to keep it, and with them, in 32 bits, one of three programs.
    for pair in tl.range(tl.program_id(0), num_pairs, tl.num_programs(0), disable_licm=True):
        index, place = _place(pair, num_items, num_heads, GROUP)
        head = tl.load(Heads + place)
        base, length, first, low, high, global_first, global_end = load_item(Items, index)
        at_q, at_k, at_v = at(Q, head, stride_qh), at(K, head, stride_kh), at(V, head, stride_vh)
        offsets = tl.arange(0, BLOCK_Q)
        query, slot = first + offsets, base + first * DILATION
        slots = slot + offsets * DILATION  # [BLOCK_Q]
        is_query = query < length
        rows = offsets * DILATION
        at_q = at(at_q, slot, stride_qt)
        q = load_rows(at_q, rows, stride_qt, is_query, HEAD_DIM, BLOCK_D, True)  # [BLOCK_Q, D]
        m_i = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        l_i = tl.full([BLOCK_Q], 0.0, tl.float32)
        acc = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)

        if BLOCK_G > 0:
            for start in range(global_first, global_end, BLOCK_G):
                key_slots, is_key, k, v = load_globals(
                    at_k, at_v, Globals, stride_kt, stride_vt, start, global_end,
                    HEAD_DIM, BLOCK_D, BLOCK_G,
                )  # fmt: skip
                distance = slots[:, None] - key_slots[None, :]  # [BLOCK_Q, BLOCK_G]
                sees = is_key[None, :] & is_extra(distance, radius, DILATION, CAUSAL)
                m_i, l_i, acc = softmax_step(
                    m_i, l_i, acc, q, k, v, sees, slots, key_slots, scale_log2,
                    head, seed, threshold, HAS_DROPOUT, True,
                )  # fmt: skip

        last = tl.minimum(first + BLOCK_Q, length) - 1
        right = 0 if CAUSAL else radius
        begin, end = whole_tiles(first, last, length, low, high, radius, right, BLOCK_K)
        if scale_log2 < 0:
            # The unmasked tiles count on it.
            begin, end = high, high
        for part in tl.static_range(3):
            part_start, part_end = span_of(part, low, begin, end, high)
            for start in range(part_start, part_end, BLOCK_K):
                key, key_slots, is_key, k, v = load_keys(
                    at_k, at_v, Valid, stride_kt, stride_vt, base, length, start,
                    HEAD_DIM, BLOCK_D, BLOCK_K, DILATION, HAS_INVALID, part != 1 or HAS_INVALID,
                )  # fmt: skip
                sees = is_key[None, :]
                if part != 1:
                    sees = sees & is_near(query[:, None] - key[None, :], radius, CAUSAL)
                m_i, l_i, acc = softmax_step(
                    m_i, l_i, acc, q, k, v, sees, slots, key_slots, scale_log2,
                    head, seed, threshold, HAS_DROPOUT, part != 1 or HAS_INVALID,
                )  # fmt: skip

        sees_any = only_valid(Valid, slots, is_query, HAS_INVALID) & (l_i > 0)
        l_i = tl.where(sees_any, l_i, 1.0)
        acc = tl.where(sees_any[:, None], acc * (kept_scale / l_i)[:, None], 0.0)
        lse = tl.where(sees_any, (m_i + tl.log2(l_i)) * LN_2, float("-inf"))  # [BLOCK_Q]
        at_out = at(Out, slot, stride_ot) + head * HEAD_DIM
        store_rows(at_out, acc, rows, stride_ot, is_query, HEAD_DIM, BLOCK_D)
        if Remainder is not None:
            lost = acc - acc.to(Out.dtype.element_ty).to(tl.float32)  # [BLOCK_Q, D]
            at_lost = at(Remainder, slot, stride_ot) + head * HEAD_DIM
            store_rows(at_lost, lost, rows, stride_ot, is_query, HEAD_DIM, BLOCK_D)
        tl.store(at(Lse, head, num_tokens) + slots, lse, mask=is_query)
