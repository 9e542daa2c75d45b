"""Few rows times many on CPUs: products with weights, and attention to the keys of a source.

What a decoder's step is made of. `few_rows.cpp`, compiled when the package is installed, does it at
about the speed of the memory, in float32 and bfloat16, where the CPU has AVX-512; torch does it
everywhere else. Not for what a gradient may be wanted of.
Shape letters: R rows, N weights, K their length, B documents, b rows of each, H heads, n tokens of
the longest document, D head dimension.
"""

import functools
import logging
import math
from array import array
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longformer_core.cpu import has_avx512, multiplies_bfloat16_slowly
from longformer_core.operators import fake_of, has_no_gradient, operator

logger = logging.getLogger(__name__)

# Lengths are whole numbers of these: what is loaded at once.
_CHUNK = 32
# Between these torch is behind. One or two rows of float32 it reads at the same speed; of 16 bits
# it multiplies many rows by instructions for matrices where there are any.
_ROWS_FLOAT32 = range(3, 17)
_ROWS_BFLOAT16 = range(1, 65)
_ROWS_BFLOAT16_BESIDE_AMX = range(1, 9)
_MOST_ROWS_OF_A_DOCUMENT = 16


def can_multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether `multiply` takes these, and is the faster way.

    Not if they do not fit together either: torch then says what is wrong.
    """
    tensors = (states, weight) if bias is None else (states, weight, bias)
    if states.dim() != 2 or not _can_compute(*tensors) or not weight.is_contiguous():
        return False
    length = states.shape[1]
    if length % _CHUNK or weight.shape[1:] != (length,):
        return False
    return len(states) in _rows_to_multiply(states.dtype)


def multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `states weight^T + bias`, summed in float32 and rounded once.

    A row of the result depends on that row alone, to the bit.
    Shapes: states [R, K]; weight [N, K]; bias [N]; returns [R, N].
    """
    out: Tensor = _multiply(states, weight, bias)
    return out


@operator("few_rows_linear")
def _multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    states = states.contiguous()
    out = states.new_empty(len(states), len(weight))
    bias = None if bias is None else bias.contiguous()
    kernels = _kernels()
    assert kernels is not None
    kernels.linear(
        states.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *out.shape,
        states.shape[1],
        states.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


@fake_of(_multiply)
def _(states: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
    return states.new_empty(len(states), len(weight))


@register_flop_formula(torch.ops.longhaul.few_rows_linear)
def _(states: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * states[0] * math.prod(weight)


has_no_gradient(_multiply, "it is for decoders' steps")


def can_attend(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Tell whether `attend` takes these, and is the faster way; see `can_multiply`."""
    if not _can_compute(q, keys, values):
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
    kernels = _kernels()
    assert kernels is not None
    kernels.attend(
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


def _can_compute(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.bfloat16) or torch.is_autocast_enabled("cpu"):
        return False
    if any(x.dtype != dtype or not x.is_cpu for x in tensors):
        return False
    return _kernels() is not None


def _rows_to_multiply(dtype: torch.dtype) -> range:
    if dtype == torch.float32:
        return _ROWS_FLOAT32
    return _ROWS_BFLOAT16 if multiplies_bfloat16_slowly() else _ROWS_BFLOAT16_BESIDE_AMX


@functools.cache
def _kernels() -> ModuleType | None:
    """Return what was compiled, None where it cannot run; said once in the log."""
    reason = "this CPU has no AVX-512"
    if has_avx512():
        try:
            return import_module("longformer_core._few_rows")
        except ImportError as error:
            reason = f"few_rows.cpp was not compiled when the package was installed ({error})"
    logger.info("a decoder's rows are computed by torch on this CPU: %s", reason)
    return None
