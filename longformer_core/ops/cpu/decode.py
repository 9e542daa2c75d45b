"""Few rows times many on CPUs: products with weights, and attention to the keys of a source.

What a decoder's step is made of. `csrc/decode.cpp`, compiled when the package is installed,
does it at about the speed of the memory, in float32 and bfloat16, where the CPU has AVX-512; torch
does it everywhere else. Not for what a gradient may be wanted of.
Shape letters: R rows, N weights, K their length, B documents, b rows of each, H heads, n tokens of
the longest document, D head dimension.
"""

import math
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longformer_core.ops.cpu.features import (
    kernels,
    may_read,
    multiplies_bfloat16_slowly,
    multiplies_float32_slowly,
)
from longformer_core.ops.cpu.linear_op import may_multiply, product
from longformer_core.ops.custom_op import fake_of, has_no_gradient, operator

# Lengths are whole numbers of these: what is loaded at once.
_CHUNK = 32
# Between these torch is behind. One or two rows of float32 it reads at the same speed, unless its
# library leaves AVX-512 out; more rows of 16 bits it multiplies by instructions for them, where
# there are any.
_ROWS_FLOAT32 = range(3, 17)
_ROWS_FLOAT32_SLOW = range(1, 193)
_ROWS_BFLOAT16 = range(1, 9)
_ROWS_BFLOAT16_SLOW = range(1, 65)
_MOST_ROWS_OF_A_DOCUMENT = 16

_multiply = product("few_rows_linear")


def can_multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether `multiply` takes these, and is the faster way.

    Not if they do not fit together either: torch then says what is wrong.
    """
    if not may_multiply(states, weight, bias, multiple=_CHUNK) or kernels() is None:
        return False
    return len(states) in _rows_to_multiply(states.dtype)


def multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `states weight^T + bias`, summed in float32 and rounded once.

    A row of the result depends on that row alone, to the bit.
    Shapes: states [R, K]; weight [N, K]; bias [N]; returns [R, N].
    """
    out: Tensor = _multiply(states, weight, bias)
    return out


def can_attend(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Tell whether `attend` takes these, and is the faster way; see `can_multiply`."""
    if not may_read(q, keys, values) or kernels() is None:
        return False
    num_documents, rows, num_heads, head_dim = q.shape
    if head_dim % _CHUNK or rows > _MOST_ROWS_OF_A_DOCUMENT or keys.shape != values.shape:
        return False
    fits = keys.shape[:2] == (num_documents, num_heads) and keys.shape[3] == head_dim
    # Rows lie together, in keys and values alike.
    return fits and keys.stride() == values.stride() and keys.stride()[2:] == (head_dim, 1)


def attend(q: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Let the rows of each document attend to the first `lengths[i]` tokens of it.

    As `scaled_dot_product_attention` with its default scale, but zeros for a document without
    tokens. A row of the result depends on that row and its document alone, to the bit.
    Shapes: q [B, b, H, D]; keys, values [B, H, n, D]; returns [B, b, H, D].
    """
    out: Tensor = _attend(q, keys, values, lengths)
    return out


@operator("few_rows_attention")
def _attend(q: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> Tensor:
    q = q.contiguous()
    out = torch.empty_like(q)
    sizes = array("q", lengths)
    compiled = kernels()
    assert compiled is not None
    compiled.few_rows_attend(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        sizes.buffer_info()[0],
        *q.shape,
        *keys.stride()[:2],
        q.shape[3] ** -0.5,
        q.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


@fake_of(_attend)
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


@register_flop_formula(torch.ops.longhaul.few_rows_attention)
def _(q: Sequence[int], *given: Any, **_: Any) -> int:
    lengths: Sequence[int] = given[2]
    return 4 * math.prod(q[1:]) * sum(lengths)


has_no_gradient(_attend, "it is for decoders' steps")


def _rows_to_multiply(dtype: torch.dtype) -> range:
    if dtype == torch.float32:
        return _ROWS_FLOAT32_SLOW if multiplies_float32_slowly() else _ROWS_FLOAT32
    return _ROWS_BFLOAT16_SLOW if multiplies_bfloat16_slowly() else _ROWS_BFLOAT16
