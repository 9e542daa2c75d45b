"""Window attention in one pass over tiles, by Triton kernels for GPUs: forward and backward.

The unit of work is a tile of queries of one document and one head; going forward, as many programs
as the GPU holds walk over all of them. Its keys are the document's global
tokens outside each query's band, gathered in chunks, and then the tiles of the band: those at the
band's left edge masked, those that every query sees whole unmasked, those at the right edge masked.
With dilation d a document is read as d documents, of every d-th token.
The kernels are in `window_forward.py` and `window_backward.py`.
Shape letters: T packed tokens, H heads, D head dimension, G global tokens of the whole batch.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longformer_core.attention.band import Band
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
from longformer_core.attention.fused.plan import Call
from longformer_core.attention.fused.window_backward import (
    backward_globals_kernel,
    backward_keys_kernel,
    backward_queries_kernel,
    sum_parts_kernel,
)
from longformer_core.attention.fused.window_forward import forward_kernel
from longformer_core.layout import Layout
from longformer_core.ops.custom_op import fake_of, has_no_gradient, operator

# By kernel, padded head size up to, bytes of a number; of "globals" the keys are global ones.
# Chosen by compiling for compute capability 8.0 and 9.0 (see test_compiled.py), not by timing: no
# kernel spills registers, and each fits into the 99 KiB of shared memory of an 8.6. `resident` by
# what that prints: 65,536 registers and 164 (8.0) or 227 KiB (9.0) of shared memory hold one
# program of 8 warps with 150 to 208 registers each and 48 to 64 KiB, as in 16 bits, and mostly
# three with 80 and 28 to 32 KiB, as in 32. Where fewer fit (two of 106 registers), programs take
# turns, and each has its share all the same.
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
    ("keys", 64, 2): Tiles(32, 128, 8, 2),
    ("keys", 128, 2): Tiles(32, 64, 8, 2),
    ("keys", 64, 4): Tiles(16, 32, 4, 1),
    ("keys", 128, 4): Tiles(16, 32, 8, 1),
    ("globals", 64, 2): Tiles(32, 64, 8, 2),
    ("globals", 128, 2): Tiles(32, 64, 8, 2),
    ("globals", 64, 4): Tiles(16, 32, 4, 1),
    ("globals", 128, 4): Tiles(16, 32, 8, 1),
}
# Tiles of a group (see `window_forward.py`). A prime, so that programs, whose number it hardly
# divides, come to every place in a group, and none to the short first and last tiles of documents
# alone.
_GROUP = 31
# What counts as multiprocessors where there are none: so few that programs of tests walk.
_CPU_MULTIPROCESSORS = 2
# Numbers of a program that adds up rows.
_SUM_BLOCK = 1024


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
    q, k, v = (with_unit_stride(x) for x in (q, k, v))
    with device_of(q):
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
    grad, q, k, v = (with_unit_stride(x) for x in (grad, q, k, v))
    with device_of(q):
        dtype = q.dtype
        if call.most_keys <= FEW_KEYS:
            grad, q, k, v, out = (x.float() for x in (grad, q, k, v, out))
        dq, dk, dv = _run_backward(call, grad, q, k, v, out, lse, remainder)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


@fake_of(_attend)
def _(q: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(q, needs_gradient=given[-1])


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


def _tiles(kernel: str, q: Tensor, *, has_dropout: bool = False) -> Tiles:
    """Return how a kernel is cut for the head size and dtype of q."""
    cut = max(64, triton.next_power_of_2(q.shape[-1])), q.element_size()
    tiles = _TILES[(kernel, *cut)]
    return _TILES.get((f"{kernel} with dropout", *cut), tiles) if has_dropout else tiles


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of tokens and heads, by the names that kernels have for them."""
    strides = {}
    for name, x in tensors.items():
        strides[f"stride_{name}t"], strides[f"stride_{name}h"] = x.stride(0), x.stride(1)
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
                        "Items": items,
                        "Heads": heads,
                        "Valid": call.valid if has_invalid else None,
                        "DILATION": dilation,
                        "HAS_INVALID": has_invalid,
                    },
                )


def _run_forward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, *, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = q.shape[2]
    out, lse, remainder = empty_results(q, needs_gradient=needs_gradient)
    tiles = _tiles("forward", q, has_dropout=call.dropout[0] > 0)
    arguments = {
        **call.shared,
        **head_sizes(head_dim),
        **_strides(q=q, k=k, v=v),
        **tiles.blocks,
        **tiles.options,
        "Remainder": or_none(remainder),
        "Globals": call.globals,
        "stride_ot": q.shape[1] * head_dim,
        "BLOCK_G": call.chunk(tiles.block_k),
        "GROUP": _GROUP,
    }
    resident = tiles.resident * _num_multiprocessors(q.device)
    for (num_items, num_heads), launch in _launches(call, tiles.block_q):
        programs = min(num_items * num_heads, resident)
        arguments |= {"num_items": num_items, "num_heads": num_heads}
        forward_kernel[programs,](q, k, v, out, lse, **launch, **arguments)
    return out, lse, remainder


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
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if not len(q):
        return dq, dk, dv
    read = (q, k, v, grad, lse, deltas(grad, out, lse, remainder))
    shared = {
        **call.shared,
        **head_sizes(q.shape[2]),
        **_strides(q=q, k=k, v=v, do=grad),
        "stride_ot": q.shape[1] * q.shape[2],
    }
    tiles = _tiles("queries", q, has_dropout=call.dropout[0] > 0)
    own = {
        "scale": call.scale,
        "Globals": call.globals,
        "BLOCK_G": call.chunk(tiles.block_k),
        **tiles.blocks,
        **tiles.options,
    }
    for grid, launch in _launches(call, tiles.block_q):
        backward_queries_kernel[grid](*read, dq, **launch, **own, **shared)
    global_dk, global_dv = _run_globals(call, read, shared)
    tiles = _tiles("keys", q)
    own = {
        "scale": call.scale,
        "Ranks": call.ranks,
        "Global_dK": global_dk,
        "Global_dV": global_dv,
        "HAS_GLOBALS": global_dk is not None,
        **tiles.blocks,
        **tiles.options,
    }
    for grid, launch in _launches(call, tiles.block_k, keys=True):
        backward_keys_kernel[grid](*read, dk, dv, **launch, **own, **shared)
    return dq, dk, dv


def _run_globals(
    call: Call, read: tuple[Tensor, ...], shared: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Return what global keys and values get from queries that do not have them in their band."""
    q = read[0]
    tiles = _tiles("globals", q)
    chunk = call.chunk(tiles.block_k)
    if not chunk:
        return None, None
    items, table, num_rows = call.global_work(chunk)
    shape = q.shape[1:]
    partial = q.new_empty(2, num_rows, *shape, dtype=torch.float32)
    for dilation, heads in call.head_groups:
        backward_globals_kernel[len(items), len(heads)](
            *read, *partial, items, heads, call.globals, call.valid,
            DILATION=dilation, HAS_INVALID=call.valid is not None,
            BLOCK_Q=tiles.block_q, BLOCK_G=chunk, **tiles.options, **shared,
        )  # fmt: skip
    sums = q.new_empty(2, len(table), *shape, dtype=torch.float32)
    size = shape[0] * shape[1]
    grid = len(table), triton.cdiv(size, _SUM_BLOCK)
    for parts, total in zip(partial, sums, strict=True):
        sum_parts_kernel[grid](
            parts, total, table, SIZE=size, BLOCK=_SUM_BLOCK, **FUSED_MULTIPLY_ADD
        )
    return sums[0], sums[1]


def _num_flops(q: Sequence[int], call: Call, kernel: str, products: int) -> int:
    """Return the flops of so many products of all queries and keys, for torch's counter.

    It tells no dtype: the tiles are those of 16 bits.
    """
    tile = _TILES[kernel, max(64, triton.next_power_of_2(q[2])), 2].block_q
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
