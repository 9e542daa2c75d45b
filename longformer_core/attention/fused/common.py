"""What the kernels for windows and those for few queries share: loads, steps and launch options.

In kernels pointers begin with a capital or are gradients (Q, Lse, dK), values are in small letters
(q, lse, dk; dS is the gradient of the scores), and what is known when a kernel is compiled is all
in capitals. Triton has no types. The names are those of the papers: m_i is the running maximum of
a query's scores, l_i its running sum, alpha what takes sums from the old maximum to the new one.
Shape letters: D the head dimension, filled up to a power of 2: BLOCK_D.
Source: the online softmax and its gradients: FlashAttention-2, arXiv:2307.08691.
"""

# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longformer_core.attention.fused.plan import ITEM

# Up to so many keys of a query, inputs of 16 bits go back in 32: roundings of so few do not average
# out, and there is little to compute.
FEW_KEYS = 32
# A product and a sum may be one rounding; Triton wants it said.
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}
# Rows of a program that only reads.
_READ = 64

LN_2 = tl.constexpr(math.log(2))
LOG2_E = tl.constexpr(math.log2(math.e))
_ITEM = tl.constexpr(ITEM)


class Tiles(NamedTuple):
    """How a kernel is cut: queries and keys of a tile, warps, pipeline stages.

    A program has a tile of its own of the one, and steps over tiles of the other.
    `resident`: programs that a multiprocessor holds at once, for kernels that walk over their work.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    resident: int = 1

    @property
    def blocks(self) -> dict[str, int]:
        """Return the sizes by the names that kernels have for them."""
        return {"BLOCK_Q": self.block_q, "BLOCK_K": self.block_k}

    @property
    def options(self) -> dict[str, int]:
        """Return what the compiler has to know beside a kernel's arguments."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **FUSED_MULTIPLY_ADD,
        }


def head_sizes(head_dim: int) -> dict[str, int]:
    """Return the arguments of a launch that the head dimension decides on."""
    return {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}


def device_of(q: Tensor) -> AbstractContextManager[Any]:
    """Launch where the tensors are, whatever device is current."""
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()


def with_unit_stride(x: Tensor) -> Tensor:
    """Return x with heads whose numbers lie together, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_results(q: Tensor, *, needs_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for output, log-sum-exp and remainder, which of 32 bits is empty."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    has_remainder = needs_gradient and q.element_size() < 4
    return out, lse, torch.empty_like(out) if has_remainder else q.new_empty(0)


def or_none(remainder: Tensor) -> Tensor | None:
    """Return a remainder as kernels take it."""
    return remainder if remainder.numel() else None


def deltas(dO: Tensor, out: Tensor, lse: Tensor, remainder: Tensor) -> Tensor:
    """Return the sum of each row of output times gradient: of [T, H, D] [H, T] float32."""
    num_rows, num_heads, head_dim = out.shape
    delta = torch.empty_like(lse)
    if num_rows:
        _delta_kernel[(triton.cdiv(num_rows, _READ), num_heads)](
            out, or_none(remainder), dO, delta, num_heads * head_dim, *dO.stride()[:2], num_rows,
            **head_sizes(head_dim), BLOCK_Q=_READ, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return delta


@triton.jit(do_not_specialize=["num_tokens"])
def _delta_kernel(
    Out, Remainder, dO, Delta, stride_ot, stride_dot, stride_doh, num_tokens,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Sum each row of output times gradient.

    Of the output before rounding: a query with few keys has a gradient smaller than what rounding
    would do to this sum.
    """
    head = tl.program_id(1)
    slot = tl.program_id(0) * BLOCK_Q
    rows = tl.arange(0, BLOCK_Q)
    is_row = slot + rows < num_tokens
    Out = at(Out, slot, stride_ot) + head * HEAD_DIM
    dO = at(at(dO, slot, stride_dot), head, stride_doh)
    out = load_rows(Out, rows, stride_ot, is_row, HEAD_DIM, BLOCK_D, True)  # [BLOCK_Q, D]
    out = out.to(tl.float32)
    if Remainder is not None:
        Remainder = at(Remainder, slot, stride_ot) + head * HEAD_DIM
        out += load_rows(Remainder, rows, stride_ot, is_row, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    do = load_rows(dO, rows, stride_dot, is_row, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    Delta = at(Delta, head, num_tokens) + slot + rows
    tl.store(Delta, tl.sum(out * do, 1), mask=is_row)


@triton.jit
def load_item(Items, index):
    """Return the numbers of a work item, as `plan.ITEM` says; the last is for alignment."""
    Item = Items + index * _ITEM
    base, length, first = tl.load(Item), tl.load(Item + 1), tl.load(Item + 2)
    low, high = tl.load(Item + 3), tl.load(Item + 4)
    return base, length, first, low, high, tl.load(Item + 5), tl.load(Item + 6)


@triton.jit
def at(X, index, stride):
    """Return the address of one row: rows may lie more than 2**31 numbers apart."""
    return X + index.to(tl.int64) * stride


@triton.jit
def load_rows(
    X, rows, stride, is_row,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load rows [n, D], zeros where `is_row` [n] is not set and beyond the head dimension."""
    columns = tl.arange(0, BLOCK_D)
    at_x = X + rows[:, None] * stride + columns[None, :]  # [n, D]
    if MASKED and HEAD_DIM < BLOCK_D:
        return tl.load(at_x, mask=is_row[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    if MASKED:
        return tl.load(at_x, mask=is_row[:, None], other=0.0)
    if HEAD_DIM < BLOCK_D:
        return tl.load(at_x, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    return tl.load(at_x)


@triton.jit
def store_rows(
    X, values, rows, stride, is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Store rows [n, D], in the dtype of the memory, where `is_row` [n] is set."""
    columns = tl.arange(0, BLOCK_D)
    at_x = X + rows[:, None] * stride + columns[None, :]  # [n, D]
    mask = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(at_x, values.to(X.dtype.element_ty), mask=mask)


@triton.jit
def only_valid(Valid, slots, is_row, HAS_INVALID: tl.constexpr):
    """Narrow `is_row` to valid tokens."""
    if HAS_INVALID:
        return is_row & (tl.load(Valid + slots, mask=is_row, other=0) != 0)
    return is_row


@triton.jit
def load_lse(Lse, slots, is_query):
    """Return log-sum-exps in powers of 2, infinite for rows without keys: so p is 0 there."""
    lse = tl.load(Lse + slots, mask=is_query, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def _is_kept(query_slots, key_slots, head, seed, threshold):
    """Draw which probabilities dropout keeps, from their places alone."""
    drawn, _, _, _ = tl.philox(seed, key_slots, query_slots, head, 0)
    return drawn >= threshold.to(tl.uint32)


@triton.jit
def softmax_step(
    m_i, l_i, acc, q, k, v, sees, query_slots, key_slots, scale_log2, head, seed, threshold,
    HAS_DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add keys to the running maximum, sum and output of queries, in powers of 2.

    Shapes: m_i, l_i [block_q]; acc, q [block_q, D]; k, v [block_k, D]; sees [block_q, block_k].
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [block_q, block_k]
    if MASKED:
        s = tl.where(sees, s * scale_log2, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))  # [block_q]
        # A row that has seen no key yet has no finite maximum: minus infinity less that is NaN.
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - pivot[:, None])  # [block_q, block_k]
    else:
        # Here the scale is not negative, and one product less in each score is measurable.
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
        pivot = m_new
        p = tl.exp2(s * scale_log2 - pivot[:, None])
    alpha = tl.exp2(m_i - pivot)  # [block_q]
    l_i = l_i * alpha + tl.sum(p, 1)
    if HAS_DROPOUT:
        kept = _is_kept(query_slots[:, None], key_slots[None, :], head, seed, threshold)
        p = tl.where(kept, p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l_i, acc


@triton.jit
def score_gradients(
    q, do, lse, delta, k, v, sees, query_slots, key_slots,
    scale_log2, head, seed, threshold, kept_scale,
    HAS_DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the probabilities of keys for queries, and the gradients of their scores.

    Shapes: q, do [block_q, D]; lse, delta [block_q]; k, v [block_k, D]; the rest and what is
        returned [block_q, block_k].
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    s = s * scale_log2
    if MASKED:
        s = tl.where(sees, s, float("-inf"))
    p = tl.exp2(s - lse[:, None])
    dP = tl.dot(do, tl.trans(v), input_precision="ieee")
    if HAS_DROPOUT:
        kept = _is_kept(query_slots[:, None], key_slots[None, :], head, seed, threshold)
        dP = tl.where(kept, dP * kept_scale, 0.0)
    return p, p * (dP - delta[:, None])


@triton.jit
def key_step(
    dk, dv, k, v, q, do, lse, delta, sees, query_slots, key_slots,
    scale_log2, head, seed, threshold, kept_scale,
    HAS_DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what queries give to the gradients of keys and values; keys are the rows of scores.

    Shapes: dk, dv, k, v [block_k, D]; q, do [block_q, D]; lse, delta [block_q];
        sees [block_k, block_q].
    """
    s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [block_k, block_q]
    s = s * scale_log2
    if MASKED:
        s = tl.where(sees, s, float("-inf"))
    p = tl.exp2(s - lse[None, :])
    dP = tl.dot(v, tl.trans(do), input_precision="ieee")  # [block_k, block_q]
    dropped = p
    if HAS_DROPOUT:
        kept = _is_kept(query_slots[None, :], key_slots[:, None], head, seed, threshold)
        dP = tl.where(kept, dP * kept_scale, 0.0)
        dropped = tl.where(kept, p * kept_scale, 0.0)
    dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
    dS = p * (dP - delta[None, :])
    dk = tl.dot(dS.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def whole_tiles(first, last, length, low, high, left, right, SIZE: tl.constexpr):
    """Return where, of tiles from `low` on, those begin and end that a whole own tile sees."""
    begin = low + (tl.maximum(last - left - low, 0) + SIZE - 1) // SIZE * SIZE
    stop = tl.minimum(tl.minimum(first + right + 1, length), high)
    end = low + tl.maximum(stop - low, 0) // SIZE * SIZE
    begin = tl.minimum(begin, high)
    return begin, tl.maximum(begin, end)


@triton.jit
def span_of(PART: tl.constexpr, low, begin, end, high):
    """Return the span of one part of the band: the left edge, what is seen whole, the right one."""
    if PART == 0:
        return low, begin
    if PART == 1:
        return begin, end
    return end, high


@triton.jit
def is_near(distance, radius, CAUSAL: tl.constexpr):
    """Tell for distances, query minus key within a class, whether the band has them."""
    if CAUSAL:
        return (distance >= 0) & (distance <= radius)
    return (distance <= radius) & (distance >= -radius)


@triton.jit
def is_extra(distance, radius, DILATION: tl.constexpr, CAUSAL: tl.constexpr):
    """Tell for distances in slots whether a global key is seen there, but not in the band."""
    far = (distance > radius * DILATION) | (distance % DILATION != 0)
    if CAUSAL:
        return (distance >= 0) & far
    return far | (distance < -radius * DILATION)


@triton.jit
def load_keys(
    K, V, Valid, stride_kt, stride_vt, base, length, first,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr, DILATION: tl.constexpr,
    HAS_INVALID: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load a tile of the band's keys and values; return indices, slots and flags with them."""
    offsets = tl.arange(0, SIZE)
    index = first + offsets
    slot = base + first * DILATION
    slots = slot + offsets * DILATION
    is_key = only_valid(Valid, slots, index < length, HAS_INVALID)
    rows = offsets * DILATION
    k = load_rows(at(K, slot, stride_kt), rows, stride_kt, is_key, HEAD_DIM, BLOCK_D, MASKED)
    v = load_rows(at(V, slot, stride_vt), rows, stride_vt, is_key, HEAD_DIM, BLOCK_D, MASKED)
    return index, slots, is_key, k, v


@triton.jit
def load_queries(
    Q, dO, Lse, Delta, Valid, stride_qt, stride_dot, base, length, first,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr, DILATION: tl.constexpr,
    HAS_INVALID: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load what the backward pass needs of a tile of queries."""
    offsets = tl.arange(0, SIZE)
    index = first + offsets
    slot = base + first * DILATION
    slots = slot + offsets * DILATION
    is_query = only_valid(Valid, slots, index < length, HAS_INVALID)
    rows = offsets * DILATION
    q = load_rows(at(Q, slot, stride_qt), rows, stride_qt, is_query, HEAD_DIM, BLOCK_D, MASKED)
    do = load_rows(at(dO, slot, stride_dot), rows, stride_dot, is_query, HEAD_DIM, BLOCK_D, MASKED)
    lse = load_lse(Lse, slots, is_query)
    delta = tl.load(Delta + slots, mask=is_query, other=0.0)
    return index, slots, is_query, q, do, lse, delta


@triton.jit
def load_globals(
    K, V, Globals, stride_kt, stride_vt, first, end,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Gather a chunk of global keys and values; return slots and flags with them."""
    index = first + tl.arange(0, BLOCK_G)
    is_key = index < end
    slots = tl.load(Globals + index, mask=is_key, other=0)
    k = load_rows(K, slots.to(tl.int64), stride_kt, is_key, HEAD_DIM, BLOCK_D, True)
    v = load_rows(V, slots.to(tl.int64), stride_vt, is_key, HEAD_DIM, BLOCK_D, True)
    return slots, is_key, k, v
