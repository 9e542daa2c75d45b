"""Window attention in one pass over tiles, as Triton kernels for GPUs: forward and backward.

The unit of work is a tile of queries of one document and one head; going forward, as many programs
as the GPU holds walk over all of them. Its keys are the document's global
tokens outside each query's band, gathered in chunks, and then the tiles of the band: those at the
band's left edge masked, those that every query sees whole unmasked, those at the right edge masked.
Going back there is a program for each tile of queries (dQ), for each tile of keys (dK, dV), and for
each chunk of global keys and part of the queries; the last ones' sums are added up in one order, so
no two runs differ by a bit. With dilation d a document is read as d documents, of every d-th token.
Shape letters: T packed tokens, H heads, D head dimension, G global tokens of the whole batch.
"""

# What is known when a kernel is compiled has names in capitals, and Triton has no types.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longformer_core.attention.band import Band
from longformer_core.attention.fused.plan import ITEM, Call
from longformer_core.layout import Layout
from longformer_core.ops.custom_op import fake_of, has_no_gradient, operator


class Tiles(NamedTuple):
    """How a kernel is cut: rows of a program's own tile, rows of a step, warps, pipeline stages.

    `resident`: programs that a multiprocessor holds at once, for kernels that walk over their work.
    """

    own: int
    step: int
    num_warps: int
    num_stages: int
    resident: int = 1


# By kernel, padded head size up to, bytes of a number. Chosen by compiling for compute capability
# 8.0 and 9.0 (see test_fused_compiled.py), not by timing: no kernel spills registers, and each fits
# into the 99 KiB of shared memory of an 8.6. `resident` by what that prints: 65,536 registers and
# 164 (8.0) or 227 KiB (9.0) of shared memory hold one program of 8 warps with 150 to 208 registers
# each and 48 to 64 KiB, as in 16 bits, and mostly three with 80 and 28 to 32 KiB, as in 32. Where
# fewer fit (two of 106 registers), programs take turns, and each has its share all the same.
_TILES: dict[tuple[str, int, int], Tiles] = {
    ("forward", 64, 2): Tiles(128, 64, 8, 3),
    # The numbers that dropout draws need registers of their own.
    ("forward with dropout", 64, 2): Tiles(128, 32, 8, 3),
    ("forward", 128, 2): Tiles(128, 32, 8, 2),
    ("forward", 64, 4): Tiles(64, 16, 8, 2, resident=3),
    ("forward", 128, 4): Tiles(32, 16, 8, 1, resident=3),
    ("queries", 64, 2): Tiles(128, 64, 8, 2),
    ("queries with dropout", 64, 2): Tiles(128, 32, 8, 2),
    ("queries", 128, 2): Tiles(64, 64, 8, 2),
    ("queries", 64, 4): Tiles(32, 16, 4, 1),
    ("queries", 128, 4): Tiles(32, 16, 8, 1),
    ("keys", 64, 2): Tiles(128, 32, 8, 2),
    ("keys", 128, 2): Tiles(64, 32, 8, 2),
    ("keys", 64, 4): Tiles(32, 16, 4, 1),
    ("keys", 128, 4): Tiles(32, 16, 8, 1),
    ("globals", 64, 2): Tiles(64, 32, 8, 2),
    ("globals", 128, 2): Tiles(64, 32, 8, 2),
    ("globals", 64, 4): Tiles(32, 16, 4, 1),
    ("globals", 128, 4): Tiles(32, 16, 8, 1),
}
# Up to so many keys of a query, inputs of 16 bits go back in 32: roundings of so few do not average
# out, and there is little to compute.
_FEW_KEYS = 32
# Tiles of a block (see `_place`). A prime, so that programs, whose number it hardly divides, come
# to every place in a block, and none to the short first and last tiles of documents alone.
_BLOCK = 31
# What counts as multiprocessors where there are none: so few that programs of tests walk.
_CPU_MULTIPROCESSORS = 2
# Rows of a program that only reads.
_READ = 64
_SUM_BLOCK = 1024
# A product and a sum may be one rounding; Triton wants it said.
_FUSED = {"enable_fp_fusion": True}

_LN_2 = tl.constexpr(math.log(2))
_TO_LOG_2 = tl.constexpr(math.log2(math.e))

# Arguments that change from call to call compile no kernel anew.
_CHANGING = ["num_items", "num_heads", "num_tokens", "radius", "seed", "threshold"]

_ITEM = tl.constexpr(ITEM)


@triton.jit
def _place(
    pair: tl.tensor, num_items: tl.tensor, num_heads: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Return which item and which of the heads a pair is.

    Items come in blocks, and a block with each head before the next: so the longest documents come
    first with all their heads, their tiles cost the most, and what programs are given in turns
    differs by about one tile. Of a block and head, neighbouring pairs are neighbouring tiles, which
    read the same keys at the same time.
    """
    first = pair // (BLOCK * num_heads) * BLOCK
    size = tl.minimum(num_items - first, BLOCK)
    rest = pair - first * num_heads
    return first + rest % size, rest // size


@triton.jit
def _item(items: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Return one of the work items."""
    at = items + index * _ITEM
    base, length, first = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    return base, length, first, tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)


@triton.jit
def _at(x: tl.tensor, slot: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """Return the address of one row: rows may lie more than 2**31 numbers apart."""
    return x + slot.to(tl.int64) * stride


@triton.jit
def _rows(
    x: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    is_row: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Load rows, zeros where `is_row` is not set and beyond the head size."""
    columns = tl.arange(0, PADDED)
    at = x + rows[:, None] * stride + columns[None, :]
    if MASKED and HEAD < PADDED:
        return tl.load(at, mask=is_row[:, None] & (columns < HEAD)[None, :], other=0.0)
    if MASKED:
        return tl.load(at, mask=is_row[:, None], other=0.0)
    if HEAD < PADDED:
        return tl.load(at, mask=(columns < HEAD)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _store_rows(
    x: tl.tensor,
    values: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    is_row: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """Store rows, in the dtype of the memory, where `is_row` is set."""
    columns = tl.arange(0, PADDED)
    at = x + rows[:, None] * stride + columns[None, :]
    mask = is_row[:, None] & (columns < HEAD)[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _whole_tiles(
    first: tl.tensor,
    last: tl.tensor,
    length: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """Return where, of tiles from `low` on, those begin and end that a whole own tile sees."""
    begin = low + (tl.maximum(last - left - low, 0) + SIZE - 1) // SIZE * SIZE
    stop = tl.minimum(tl.minimum(first + right + 1, length), high)
    end = low + tl.maximum(stop - low, 0) // SIZE * SIZE
    begin = tl.minimum(begin, high)
    return begin, tl.maximum(begin, end)


@triton.jit
def _is_near(distance: tl.tensor, radius: tl.tensor, CAUSAL: tl.constexpr) -> tl.tensor:
    """Tell for distances, query minus key within a class, whether the band has them."""
    if CAUSAL:
        return (distance >= 0) & (distance <= radius)
    return (distance <= radius) & (distance >= -radius)


@triton.jit
def _is_extra(
    distance: tl.tensor, radius: tl.tensor, DILATION: tl.constexpr, CAUSAL: tl.constexpr
) -> tl.tensor:
    """Tell for distances in slots whether a global key is seen there, but not in the band."""
    far = (distance > radius * DILATION) | (distance % DILATION != 0)
    if CAUSAL:
        return (distance >= 0) & far
    return far | (distance < -radius * DILATION)


@triton.jit
def _is_valid(
    valid: tl.tensor, slots: tl.tensor, is_row: tl.tensor, HAS_INVALID: tl.constexpr
) -> tl.tensor:
    """Narrow `is_row` to valid tokens."""
    if HAS_INVALID:
        return is_row & (tl.load(valid + slots, mask=is_row, other=0) != 0)
    return is_row


@triton.jit
def _is_kept(
    query_slots: tl.tensor,
    key_slots: tl.tensor,
    head: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
) -> tl.tensor:
    """Draw which probabilities dropout keeps, from their places alone."""
    drawn, _, _, _ = tl.philox(seed, key_slots, query_slots, head, 0)
    return drawn >= threshold.to(tl.uint32)


@triton.jit
def _softmax_step(
    top: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    sees: tl.tensor,
    query_slots: tl.tensor,
    key_slots: tl.tensor,
    factor: tl.tensor,
    head: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    HAS_DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Add keys to the running maximum, sum and output of queries, in powers of 2."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if MASKED:
        scores = tl.where(sees, scores * factor, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet has no finite maximum: minus infinity less that is NaN.
        pivot = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores - pivot[:, None])
    else:
        # Here `factor` is not negative, and one product less in each score is measurable.
        new = tl.maximum(top, tl.max(scores, 1) * factor)
        pivot = new
        p = tl.exp2(scores * factor - pivot[:, None])
    old = tl.exp2(top - pivot)
    total = total * old + tl.sum(p, 1)
    if HAS_DROPOUT:
        kept = _is_kept(query_slots[:, None], key_slots[None, :], head, seed, threshold)
        p = tl.where(kept, p, 0.0)
    acc = tl.dot(p.to(values.dtype), values, acc * old[:, None], input_precision="ieee")
    return new, total, acc


@triton.jit
def _key_side(
    k: tl.tensor,
    v: tl.tensor,
    valid: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    base: tl.tensor,
    length: tl.tensor,
    first: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    DILATION: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Load a tile of the band's keys and values; return indices, slots and flags with them."""
    offsets = tl.arange(0, SIZE)
    index = first + offsets
    slot = base + first * DILATION
    slots = slot + offsets * DILATION
    is_key = _is_valid(valid, slots, index < length, HAS_INVALID)
    rows = offsets * DILATION
    keys = _rows(_at(k, slot, k_stride), rows, k_stride, is_key, HEAD, PADDED, MASKED)
    values = _rows(_at(v, slot, v_stride), rows, v_stride, is_key, HEAD, PADDED, MASKED)
    return index, slots, is_key, keys, values


@triton.jit
def _query_side(
    q: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    valid: tl.tensor,
    q_stride: tl.tensor,
    grad_stride: tl.tensor,
    base: tl.tensor,
    length: tl.tensor,
    first: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    DILATION: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Load what the backward pass needs of a tile of queries.

    The log-sum-exp comes in powers of 2, infinite for rows without keys: their probabilities are 0.
    """
    offsets = tl.arange(0, SIZE)
    index = first + offsets
    slot = base + first * DILATION
    slots = slot + offsets * DILATION
    is_query = _is_valid(valid, slots, index < length, HAS_INVALID)
    rows = offsets * DILATION
    queries = _rows(_at(q, slot, q_stride), rows, q_stride, is_query, HEAD, PADDED, MASKED)
    grads = _rows(_at(grad, slot, grad_stride), rows, grad_stride, is_query, HEAD, PADDED, MASKED)
    sums = tl.load(lse + slots, mask=is_query, other=float("-inf"))
    sums = tl.where(sums == float("-inf"), float("inf"), sums * _TO_LOG_2)
    deltas = tl.load(delta + slots, mask=is_query, other=0.0)
    return index, slots, is_query, queries, grads, sums, deltas


@triton.jit
def _global_side(
    k: tl.tensor,
    v: tl.tensor,
    globals_: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """Gather a chunk of global keys and values; return slots and flags with them."""
    index = first + tl.arange(0, SIZE)
    is_key = index < end
    slots = tl.load(globals_ + index, mask=is_key, other=0)
    keys = _rows(k, slots.to(tl.int64), k_stride, is_key, HEAD, PADDED, True)
    values = _rows(v, slots.to(tl.int64), v_stride, is_key, HEAD, PADDED, True)
    return slots, is_key, keys, values


@triton.jit(do_not_specialize=_CHANGING)
def _forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    remainder: tl.tensor | None,
    items: tl.tensor,
    heads: tl.tensor,
    globals_: tl.tensor,
    valid: tl.tensor,
    q_stride: tl.tensor,
    q_head: tl.tensor,
    k_stride: tl.tensor,
    k_head: tl.tensor,
    v_stride: tl.tensor,
    v_head: tl.tensor,
    out_stride: tl.tensor,
    num_items: tl.tensor,
    num_heads: tl.tensor,
    num_tokens: tl.tensor,
    radius: tl.tensor,
    factor: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    kept_scale: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    GLOBALS: tl.constexpr,
    DILATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
) -> None:
    """Compute output and log-sum-exp of tiles of queries, for one head each.

    And, where there is memory for it, what the output loses by rounding. There are as many programs
    as the GPU holds at once, and each walks over pairs of tile and head as `_place` orders them.
    """
    num_pairs = num_items * num_heads
    # What does not change within the loop is computed again each time: it would cost 20 to 70
    # registers to keep it, and with them, in 32 bits, one of three programs.
    for pair in tl.range(tl.program_id(0), num_pairs, tl.num_programs(0), disable_licm=True):
        index, place = _place(pair, num_items, num_heads, BLOCK)
        head = tl.load(heads + place)
        base, length, first, low, high, global_first, global_end = _item(items, index)
        at_q, at_k, at_v = _at(q, head, q_head), _at(k, head, k_head), _at(v, head, v_head)
        offsets = tl.arange(0, OWN)
        query, slot = first + offsets, base + first * DILATION
        slots = slot + offsets * DILATION
        is_query = query < length
        rows = offsets * DILATION
        queries = _rows(_at(at_q, slot, q_stride), rows, q_stride, is_query, HEAD, PADDED, True)
        top = tl.full([OWN], float("-inf"), tl.float32)
        total = tl.full([OWN], 0.0, tl.float32)
        acc = tl.full([OWN, PADDED], 0.0, tl.float32)

        if GLOBALS > 0:
            for at in range(global_first, global_end, GLOBALS):
                key_slots, is_key, keys, values = _global_side(
                    at_k, at_v, globals_, k_stride, v_stride, at, global_end, HEAD, PADDED, GLOBALS
                )
                distance = slots[:, None] - key_slots[None, :]
                sees = is_key[None, :] & _is_extra(distance, radius, DILATION, CAUSAL)
                top, total, acc = _softmax_step(
                    top, total, acc, queries, keys, values, sees, slots, key_slots, factor,
                    head, seed, threshold, HAS_DROPOUT, True,
                )  # fmt: skip

        last = tl.minimum(first + OWN, length) - 1
        begin, end = _whole_tiles(
            first, last, length, low, high, radius, 0 if CAUSAL else radius, STEP
        )
        if factor < 0:
            # The unmasked tiles count on it.
            begin, end = high, high
        for part in tl.static_range(3):
            if part == 0:
                start, stop = low, begin
            elif part == 1:
                start, stop = begin, end
            else:
                start, stop = end, high
            for at in range(start, stop, STEP):
                key, key_slots, is_key, keys, values = _key_side(
                    at_k, at_v, valid, k_stride, v_stride, base, length, at,
                    HEAD, PADDED, STEP, DILATION, HAS_INVALID, part != 1 or HAS_INVALID,
                )  # fmt: skip
                sees = is_key[None, :]
                if part != 1:
                    sees = sees & _is_near(query[:, None] - key[None, :], radius, CAUSAL)
                top, total, acc = _softmax_step(
                    top, total, acc, queries, keys, values, sees, slots, key_slots, factor,
                    head, seed, threshold, HAS_DROPOUT, part != 1 or HAS_INVALID,
                )  # fmt: skip

        sees_any = _is_valid(valid, slots, is_query, HAS_INVALID) & (total > 0)
        total = tl.where(sees_any, total, 1.0)
        acc = tl.where(sees_any[:, None], acc * (kept_scale / total)[:, None], 0.0)
        sums = tl.where(sees_any, (top + tl.log2(total)) * _LN_2, float("-inf"))
        at_out = _at(out, slot, out_stride) + head * HEAD
        _store_rows(at_out, acc, rows, out_stride, is_query, HEAD, PADDED)
        if remainder is not None:
            lost = acc - acc.to(out.dtype.element_ty).to(tl.float32)
            at_lost = _at(remainder, slot, out_stride) + head * HEAD
            _store_rows(at_lost, lost, rows, out_stride, is_query, HEAD, PADDED)
        tl.store(_at(lse, head, num_tokens) + slots, sums, mask=is_query)


@triton.jit(do_not_specialize=["num_tokens"])
def _delta(
    out: tl.tensor,
    remainder: tl.tensor | None,
    grad: tl.tensor,
    delta: tl.tensor,
    out_stride: tl.tensor,
    grad_stride: tl.tensor,
    grad_head: tl.tensor,
    num_tokens: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    OWN: tl.constexpr,
) -> None:
    """Sum each row of output times gradient.

    Of the output before rounding: a query with few keys has a gradient smaller than what rounding
    would do to this sum.
    """
    head = tl.program_id(1)
    slot = tl.program_id(0) * OWN
    rows = tl.arange(0, OWN)
    is_row = slot + rows < num_tokens
    at_out = _at(out, slot, out_stride) + head * HEAD
    at_grad = _at(_at(grad, slot, grad_stride), head, grad_head)
    outs = _rows(at_out, rows, out_stride, is_row, HEAD, PADDED, True).to(tl.float32)
    if remainder is not None:
        at_lost = _at(remainder, slot, out_stride) + head * HEAD
        outs += _rows(at_lost, rows, out_stride, is_row, HEAD, PADDED, True).to(tl.float32)
    grads = _rows(at_grad, rows, grad_stride, is_row, HEAD, PADDED, True).to(tl.float32)
    at_delta = _at(delta, head, num_tokens) + slot + rows
    tl.store(at_delta, tl.sum(outs * grads, 1), mask=is_row)


@triton.jit
def _slopes(
    queries: tl.tensor,
    grads: tl.tensor,
    sums: tl.tensor,
    deltas: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    sees: tl.tensor,
    query_slots: tl.tensor,
    key_slots: tl.tensor,
    factor: tl.tensor,
    head: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    kept_scale: tl.tensor,
    HAS_DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Return the probabilities of keys for queries, and the gradients of their scores."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    scores = scores * factor
    if MASKED:
        scores = tl.where(sees, scores, float("-inf"))
    p = tl.exp2(scores - sums[:, None])
    slope = tl.dot(grads, tl.trans(values), input_precision="ieee")
    if HAS_DROPOUT:
        kept = _is_kept(query_slots[:, None], key_slots[None, :], head, seed, threshold)
        slope = tl.where(kept, slope * kept_scale, 0.0)
    return p, p * (slope - deltas[:, None])


@triton.jit
def _query_step(
    acc: tl.tensor,
    mean: tl.tensor,
    excess: tl.tensor,
    queries: tl.tensor,
    grads: tl.tensor,
    sums: tl.tensor,
    deltas: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    sees: tl.tensor,
    query_slots: tl.tensor,
    key_slots: tl.tensor,
    factor: tl.tensor,
    head: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    kept_scale: tl.tensor,
    HAS_DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Add what keys give to the gradient of queries, the mean key, and the sum of slopes."""
    p, slope = _slopes(
        queries, grads, sums, deltas, keys, values, sees, query_slots, key_slots, factor,
        head, seed, threshold, kept_scale, HAS_DROPOUT, MASKED,
    )  # fmt: skip
    excess += tl.sum(slope, 1)
    if keys.dtype == tl.float32:
        mean = tl.dot(p, keys, mean, input_precision="ieee")
    acc = tl.dot(slope.to(keys.dtype), keys, acc, input_precision="ieee")
    return acc, mean, excess


@triton.jit(do_not_specialize=_CHANGING)
def _backward_queries(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    dq: tl.tensor,
    items: tl.tensor,
    heads: tl.tensor,
    globals_: tl.tensor,
    valid: tl.tensor,
    q_stride: tl.tensor,
    q_head: tl.tensor,
    k_stride: tl.tensor,
    k_head: tl.tensor,
    v_stride: tl.tensor,
    v_head: tl.tensor,
    grad_stride: tl.tensor,
    grad_head: tl.tensor,
    out_stride: tl.tensor,
    num_tokens: tl.tensor,
    radius: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    kept_scale: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    GLOBALS: tl.constexpr,
    DILATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
) -> None:
    """Compute the gradient of one tile of queries and one head.

    In truth the slopes of a query, the gradients of its scores, have the sum 0; what the sum is, is
    the error of `delta`. It is taken off `delta`, for the keys' gradients; and in 32 bits, where a
    product more is no matter, off the queries' own.
    """
    base, length, first, low, high, global_first, global_end = _item(items, tl.program_id(0))
    head = tl.load(heads + tl.program_id(1))
    q, k, v = _at(q, head, q_head), _at(k, head, k_head), _at(v, head, v_head)
    grad = _at(grad, head, grad_head)
    lse, delta = _at(lse, head, num_tokens), _at(delta, head, num_tokens)
    query, slots, is_query, queries, grads, sums, deltas = _query_side(
        q, grad, lse, delta, valid, q_stride, grad_stride, base, length, first,
        HEAD, PADDED, OWN, DILATION, HAS_INVALID, True,
    )  # fmt: skip
    acc = tl.full([OWN, PADDED], 0.0, tl.float32)
    mean = tl.full([OWN, PADDED], 0.0, tl.float32)
    excess = tl.full([OWN], 0.0, tl.float32)

    if GLOBALS > 0:
        for at in range(global_first, global_end, GLOBALS):
            key_slots, is_key, keys, values = _global_side(
                k, v, globals_, k_stride, v_stride, at, global_end, HEAD, PADDED, GLOBALS
            )
            distance = slots[:, None] - key_slots[None, :]
            sees = is_key[None, :] & _is_extra(distance, radius, DILATION, CAUSAL)
            acc, mean, excess = _query_step(
                acc, mean, excess, queries, grads, sums, deltas, keys, values, sees, slots,
                key_slots, factor, head, seed, threshold, kept_scale, HAS_DROPOUT, True,
            )  # fmt: skip

    last = tl.minimum(first + OWN, length) - 1
    begin, end = _whole_tiles(first, last, length, low, high, radius, 0 if CAUSAL else radius, STEP)
    for part in tl.static_range(3):
        if part == 0:
            start, stop = low, begin
        elif part == 1:
            start, stop = begin, end
        else:
            start, stop = end, high
        for at in range(start, stop, STEP):
            key, key_slots, is_key, keys, values = _key_side(
                k, v, valid, k_stride, v_stride, base, length, at,
                HEAD, PADDED, STEP, DILATION, HAS_INVALID, part != 1 or HAS_INVALID,
            )  # fmt: skip
            sees = is_key[None, :]
            if part != 1:
                sees = sees & _is_near(query[:, None] - key[None, :], radius, CAUSAL)
            acc, mean, excess = _query_step(
                acc, mean, excess, queries, grads, sums, deltas, keys, values, sees, slots,
                key_slots, factor, head, seed, threshold, kept_scale, HAS_DROPOUT,
                part != 1 or HAS_INVALID,
            )  # fmt: skip

    rows = tl.arange(0, OWN) * DILATION
    if queries.dtype == tl.float32:
        acc -= excess[:, None] * mean
    tl.store(delta + slots, deltas + excess, mask=is_query)
    at_dq = _at(dq, base + first * DILATION, out_stride) + head * HEAD
    in_tile = first + tl.arange(0, OWN) < length
    _store_rows(at_dq, acc * scale, rows, out_stride, in_tile, HEAD, PADDED)


@triton.jit
def _key_step(
    dk: tl.tensor,
    dv: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    queries: tl.tensor,
    grads: tl.tensor,
    sums: tl.tensor,
    deltas: tl.tensor,
    sees: tl.tensor,
    query_slots: tl.tensor,
    key_slots: tl.tensor,
    factor: tl.tensor,
    head: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    kept_scale: tl.tensor,
    HAS_DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Add what queries give to the gradients of keys and values; all matrices have keys as rows."""
    scores = tl.dot(keys, tl.trans(queries), input_precision="ieee")
    scores = scores * factor
    if MASKED:
        scores = tl.where(sees, scores, float("-inf"))
    p = tl.exp2(scores - sums[None, :])
    slope = tl.dot(values, tl.trans(grads), input_precision="ieee")
    weights = p
    if HAS_DROPOUT:
        kept = _is_kept(query_slots[None, :], key_slots[:, None], head, seed, threshold)
        slope = tl.where(kept, slope * kept_scale, 0.0)
        weights = tl.where(kept, p * kept_scale, 0.0)
    dv = tl.dot(weights.to(grads.dtype), grads, dv, input_precision="ieee")
    slope = p * (slope - deltas[None, :])
    dk = tl.dot(slope.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


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
    items: tl.tensor,
    heads: tl.tensor,
    ranks: tl.tensor,
    global_dk: tl.tensor,
    global_dv: tl.tensor,
    valid: tl.tensor,
    q_stride: tl.tensor,
    q_head: tl.tensor,
    k_stride: tl.tensor,
    k_head: tl.tensor,
    v_stride: tl.tensor,
    v_head: tl.tensor,
    grad_stride: tl.tensor,
    grad_head: tl.tensor,
    out_stride: tl.tensor,
    num_tokens: tl.tensor,
    radius: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    kept_scale: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    HAS_GLOBALS: tl.constexpr,
    DILATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
) -> None:
    """Compute the gradients of one tile of keys and values and one head.

    Through the band; what global keys got from elsewhere is read, and added before rounding.
    """
    base, length, first, low, high, _, _ = _item(items, tl.program_id(0))
    head = tl.load(heads + tl.program_id(1))
    q, k, v = _at(q, head, q_head), _at(k, head, k_head), _at(v, head, v_head)
    grad = _at(grad, head, grad_head)
    lse, delta = _at(lse, head, num_tokens), _at(delta, head, num_tokens)
    key, key_slots, is_key, keys, values = _key_side(
        k, v, valid, k_stride, v_stride, base, length, first,
        HEAD, PADDED, OWN, DILATION, HAS_INVALID, True,
    )  # fmt: skip
    in_tile = key < length
    if HAS_GLOBALS:
        rank = tl.load(ranks + key_slots, mask=in_tile, other=-1)
        at_global = rank.to(tl.int64)
        acc_k = _rows(global_dk + head * HEAD, at_global, out_stride, rank >= 0, HEAD, PADDED, True)
        acc_v = _rows(global_dv + head * HEAD, at_global, out_stride, rank >= 0, HEAD, PADDED, True)
    else:
        acc_k = tl.full([OWN, PADDED], 0.0, tl.float32)
        acc_v = tl.full([OWN, PADDED], 0.0, tl.float32)

    last = tl.minimum(first + OWN, length) - 1
    begin, end = _whole_tiles(first, last, length, low, high, 0 if CAUSAL else radius, radius, STEP)
    for part in tl.static_range(3):
        if part == 0:
            start, stop = low, begin
        elif part == 1:
            start, stop = begin, end
        else:
            start, stop = end, high
        for at in range(start, stop, STEP):
            query, slots, is_query, queries, grads, sums, deltas = _query_side(
                q, grad, lse, delta, valid, q_stride, grad_stride, base, length, at,
                HEAD, PADDED, STEP, DILATION, HAS_INVALID, part != 1 or HAS_INVALID,
            )  # fmt: skip
            sees = is_query[None, :] & is_key[:, None]
            if part != 1:
                sees = sees & _is_near(query[None, :] - key[:, None], radius, CAUSAL)
            acc_k, acc_v = _key_step(
                acc_k, acc_v, keys, values, queries, grads, sums, deltas, sees, slots, key_slots,
                factor, head, seed, threshold, kept_scale, HAS_DROPOUT,
                part != 1 or HAS_INVALID,
            )  # fmt: skip

    rows = tl.arange(0, OWN) * DILATION
    slot = base + first * DILATION
    at_dk, at_dv = _at(dk, slot, out_stride), _at(dv, slot, out_stride)
    _store_rows(at_dk + head * HEAD, acc_k * scale, rows, out_stride, in_tile, HEAD, PADDED)
    _store_rows(at_dv + head * HEAD, acc_v, rows, out_stride, in_tile, HEAD, PADDED)


@triton.jit(do_not_specialize=_CHANGING)
def _backward_globals(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    partial_dk: tl.tensor,
    partial_dv: tl.tensor,
    items: tl.tensor,
    heads: tl.tensor,
    globals_: tl.tensor,
    valid: tl.tensor,
    q_stride: tl.tensor,
    q_head: tl.tensor,
    k_stride: tl.tensor,
    k_head: tl.tensor,
    v_stride: tl.tensor,
    v_head: tl.tensor,
    grad_stride: tl.tensor,
    grad_head: tl.tensor,
    out_stride: tl.tensor,
    num_tokens: tl.tensor,
    radius: tl.tensor,
    factor: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    kept_scale: tl.tensor,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    GLOBALS: tl.constexpr,
    DILATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
) -> None:
    """Sum what a part of a document's queries gives to a chunk of its global keys, one head."""
    base, _, low, high, global_first, global_end, row = _item(items, tl.program_id(0))
    head = tl.load(heads + tl.program_id(1))
    q, k, v = _at(q, head, q_head), _at(k, head, k_head), _at(v, head, v_head)
    grad = _at(grad, head, grad_head)
    lse, delta = _at(lse, head, num_tokens), _at(delta, head, num_tokens)
    key_slots, is_key, keys, values = _global_side(
        k, v, globals_, k_stride, v_stride, global_first, global_end, HEAD, PADDED, GLOBALS
    )
    acc_k = tl.full([GLOBALS, PADDED], 0.0, tl.float32)
    acc_v = tl.full([GLOBALS, PADDED], 0.0, tl.float32)
    for at in range(low, high, STEP):
        _index, slots, is_query, queries, grads, sums, deltas = _query_side(
            q, grad, lse, delta, valid, q_stride, grad_stride, base, high, at,
            HEAD, PADDED, STEP, 1, HAS_INVALID, True,
        )  # fmt: skip
        distance = slots[None, :] - key_slots[:, None]
        sees = is_query[None, :] & _is_extra(distance, radius, DILATION, CAUSAL)
        acc_k, acc_v = _key_step(
            acc_k, acc_v, keys, values, queries, grads, sums, deltas, sees, slots, key_slots,
            factor, head, seed, threshold, kept_scale, HAS_DROPOUT, True,
        )  # fmt: skip
    rows = tl.arange(0, GLOBALS)
    at_dk, at_dv = _at(partial_dk, row, out_stride), _at(partial_dv, row, out_stride)
    _store_rows(at_dk + head * HEAD, acc_k, rows, out_stride, is_key, HEAD, PADDED)
    _store_rows(at_dv + head * HEAD, acc_v, rows, out_stride, is_key, HEAD, PADDED)


@triton.jit
def _sum_parts(
    partial: tl.tensor, total: tl.tensor, table: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Add up the rows that one global key got from the parts of its document, in their order."""
    key = tl.program_id(0)
    row, step, count = (
        tl.load(table + key * 4),
        tl.load(table + key * 4 + 1),
        tl.load(table + key * 4 + 2),
    )
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    acc = tl.full([BLOCK], 0.0, tl.float32)
    for part in range(count):
        acc += tl.load(_at(partial, row + part * step, SIZE) + columns, mask=mask, other=0.0)
    tl.store(_at(total, key, SIZE) + columns, acc, mask=mask)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    band: Band,
    scale: float,
    dropout: tuple[float, int] = (0.0, 0),
) -> tuple[Tensor, Tensor]:
    """Compute `window_attention` and the log-sum-exp of each row's scores.

    The backward pass computes the probabilities anew from the latter, so nothing of size tokens x
    window is kept. Dropout, a probability and a seed, drops by the places of query, key and head.
    Shapes: q, k, v [T, H, D]; returns [T, H, D] in q's dtype and [T, H] in float32.
    Numerics: scores, softmax and sums in float32; probabilities and their gradients are rounded to
        the dtype of q before they are multiplied by values, keys and queries, as eager code does.
        For gradients of 16 bits the output is kept in twice as many.
    Source: the online softmax and its gradients: FlashAttention-2, arXiv:2307.08691.
    """
    assert 16 <= q.shape[-1] <= 128
    assert q.dtype == k.dtype == v.dtype
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    given = (layout.number, band.radius, band.dilations, band.is_causal, scale, *dropout)
    # One operator: torch.compile and torch.export see a single node of known shape.
    out, lse, _ = _attend(q, k, v, *given, needs_gradient)
    return out, lse.transpose(0, 1)


@operator("fused_attention")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: int,
    radius: int,
    dilations: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: int,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call_of(layout, radius, dilations, is_causal, scale, dropout_p, seed)
    q, k, v = (_with_unit_stride(x) for x in (q, k, v))
    with _device_of(q):
        return _run_forward(call, q, k, v, needs_gradient=needs_gradient)


@operator("fused_attention_backward")
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    remainder: Tensor,
    layout: int,
    radius: int,
    dilations: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call_of(layout, radius, dilations, is_causal, scale, dropout_p, seed)
    grad, q, k, v = (_with_unit_stride(x) for x in (grad, q, k, v))
    with _device_of(q):
        dtype = q.dtype
        if call.most_keys <= _FEW_KEYS:
            grad, q, k, v, out = (x.float() for x in (grad, q, k, v, out))
        dq, dk, dv = _run_backward(call, grad, q, k, v, out, lse, remainder)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


@fake_of(_attend)
def _(q: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q, needs_gradient=given[-1])


def _results(q: Tensor, *, needs_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for output, log-sum-exp and remainder, which of 32 bits is empty."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    has_remainder = needs_gradient and q.element_size() < 4
    return out, lse, torch.empty_like(out) if has_remainder else q.new_empty(0)


@fake_of(_attend_backward)
def _(_: Tensor, *qkv: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv[:3])
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.given = inputs[3:-1]
    # Numbers do not keep a layout alive, and the backward pass asks for it again.
    ctx.layout = Layout.of_number(inputs[3])


def _turn(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad, *ctx.saved_tensors, *ctx.given)
    return *grads, *(None,) * (len(ctx.given) + 1)


torch.library.register_autograd(_attend, _turn, setup_context=_save)
has_no_gradient(_attend_backward, "attention has no second derivative")


def _device_of(q: Tensor) -> AbstractContextManager[Any]:
    """Launch where the tensors are, whatever device is current."""
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tiles(kernel: str, q: Tensor, *, has_dropout: bool = False) -> Tiles:
    """Return how a kernel is cut for the head size and dtype of q."""
    cut = max(64, triton.next_power_of_2(q.shape[-1])), q.element_size()
    tiles = _TILES[(kernel, *cut)]
    return _TILES.get((f"{kernel} with dropout", *cut), tiles) if has_dropout else tiles


def _sizes(head_dim: int) -> dict[str, int]:
    return {"HEAD": head_dim, "PADDED": triton.next_power_of_2(head_dim)}


def _cut(tiles: Tiles, **sizes: int) -> dict[str, int]:
    """Return the arguments of a launch for its tiles, of which `sizes` may name the own one."""
    return {
        **(sizes or {"OWN": tiles.own}),
        "STEP": tiles.step,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **_FUSED,
    }


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of tokens and heads, by the names that kernels have for them."""
    strides = {}
    for name, x in tensors.items():
        strides[f"{name}_stride"], strides[f"{name}_head"] = x.stride(0), x.stride(1)
    return strides


@cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launches(
    call: Call, tile: int, *, keys: bool = False
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Yield grid and arguments of each launch: by dilation, with and without invalid tokens."""
    for dilation, heads in call.head_groups:
        for items, has_invalid in call.work(tile, dilation, keys=keys).parts:
            if len(items):
                yield (
                    (len(items), len(heads)),
                    {
                        "items": items,
                        "heads": heads,
                        "valid": call.valid if has_invalid else None,
                        "DILATION": dilation,
                        "HAS_INVALID": has_invalid,
                    },
                )


def _run_forward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, *, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = q.shape[2]
    out, lse, remainder = _results(q, needs_gradient=needs_gradient)
    tiles = _tiles("forward", q, has_dropout=call.dropout[0] > 0)
    arguments = {
        **call.shared,
        **_sizes(head_dim),
        **_strides(q=q, k=k, v=v),
        **_cut(tiles),
        "remainder": _or_none(remainder),
        "globals_": call.globals,
        "out_stride": q.shape[1] * head_dim,
    }
    arguments["GLOBALS"] = call.chunk(tiles.step)
    resident = tiles.resident * _num_multiprocessors(q.device)
    for (num_items, num_heads), launch in _launches(call, tiles.own):
        programs = min(num_items * num_heads, resident)
        arguments |= {"num_items": num_items, "num_heads": num_heads, "BLOCK": _BLOCK}
        _forward[programs,](q, k, v, out, lse, **launch, **arguments)
    return out, lse, remainder


def _or_none(remainder: Tensor) -> Tensor | None:
    return remainder if remainder.numel() else None


def _run_backward(
    call: Call,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    remainder: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_heads, head_dim = q.shape
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if not num_tokens:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    sizes, width = _sizes(head_dim), num_heads * head_dim
    _delta[(triton.cdiv(num_tokens, _READ), num_heads)](
        out, _or_none(remainder), grad, delta, width, *grad.stride()[:2], num_tokens,
        **sizes, OWN=_READ, **_FUSED,
    )  # fmt: skip
    read = (q, k, v, grad, lse, delta)
    strides = _strides(q=q, k=k, v=v, grad=grad)
    arguments = {**call.shared, **sizes, **strides, "out_stride": width}
    tiles = _tiles("queries", q, has_dropout=call.dropout[0] > 0)
    mine = {"scale": call.scale, "globals_": call.globals, **_cut(tiles)}
    mine["GLOBALS"] = call.chunk(tiles.step)
    for grid, launch in _launches(call, tiles.own):
        _backward_queries[grid](*read, dq, **launch, **mine, **arguments)
    global_sums = _run_globals(call, read, arguments)
    tiles = _tiles("keys", q)
    mine = {"scale": call.scale, "ranks": call.ranks, **_cut(tiles)}
    mine["global_dk"], mine["global_dv"] = global_sums
    mine["HAS_GLOBALS"] = global_sums[0] is not None
    for grid, launch in _launches(call, tiles.own, keys=True):
        _backward_keys[grid](*read, dk, dv, **launch, **mine, **arguments)
    return dq, dk, dv


def _run_globals(
    call: Call, read: tuple[Tensor, ...], arguments: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Return what global keys and values get from queries that do not have them in their band."""
    q = read[0]
    tiles = _tiles("globals", q)
    chunk = call.chunk(tiles.own)
    if not chunk:
        return None, None
    items, table, num_rows = call.global_work(chunk)
    shape = q.shape[1:]
    partial = q.new_empty(2, num_rows, *shape, dtype=torch.float32)
    for dilation, heads in call.head_groups:
        _backward_globals[len(items), len(heads)](
            *read,
            *partial,
            items=items,
            heads=heads,
            globals_=call.globals,
            valid=call.valid,
            DILATION=dilation,
            HAS_INVALID=call.valid is not None,
            **arguments,
            **_cut(tiles, GLOBALS=chunk),
        )
    sums = q.new_empty(2, len(table), *shape, dtype=torch.float32)
    size = shape[0] * shape[1]
    grid = len(table), triton.cdiv(size, _SUM_BLOCK)
    for parts, total in zip(partial, sums, strict=True):
        _sum_parts[grid](parts, total, table, SIZE=size, BLOCK=_SUM_BLOCK, **_FUSED)
    return sums[0], sums[1]


def _num_flops(q: Sequence[int], call: Call, kernel: str, products: int) -> int:
    """Return the flops of so many products of all queries and keys, for torch's counter.

    It tells no dtype: the tiles are those of 16 bits.
    """
    tile = _TILES[kernel, max(64, triton.next_power_of_2(q[2])), 2].own
    pairs = sum(
        len(heads) * call.work(tile, dilation).num_pairs for dilation, heads in call.head_groups
    )
    return 2 * products * pairs * q[2]


def _call_of(
    layout: int,
    radius: int,
    dilations: Sequence[int],
    is_causal: bool,
    scale: float,
    *dropout: Any,
) -> Call:
    band = Band(radius, tuple(dilations), is_causal)
    return Call(Layout.of_number(layout), band, scale, dropout)


@register_flop_formula(torch.ops.longhaul.fused_attention)
def _(q: Sequence[int], *given: Any, **_: Any) -> int:
    return _num_flops(q, _call_of(*given[2:-1]), "forward", 2)


@register_flop_formula(torch.ops.longhaul.fused_attention_backward)
def _(_grad: Any, q: Sequence[int], *given: Any, **_: Any) -> int:
    return _num_flops(q, _call_of(*given[5:]), "queries", 7)
