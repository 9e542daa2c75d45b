"""Products of rows and weights by kernels of our own, as operators of torch.

What `decode.py` and `gemm.py` share. Not for what a gradient may be wanted of.
Shape letters: R rows, N weights, K their length.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longformer_core.ops.cpu.features import kernels, may_read
from longformer_core.ops.custom_op import fake_of, has_no_gradient, operator


def may_multiply(states: Tensor, weight: Tensor, bias: Tensor | None, *, multiple: int) -> bool:
    """Tell whether kernels may read these as the operands of `states weight^T + bias`.

    Not if they do not fit together: torch then says what is wrong.
    Args:
        multiple: what the length of a row is a whole number of.
    """
    tensors = (states, weight) if bias is None else (states, weight, bias)
    if states.dim() != 2 or not may_read(*tensors) or not weight.is_contiguous():
        return False
    length = states.shape[1]
    if weight.dim() != 2 or weight.shape[1] != length or length % multiple:
        return False
    return bias is None or bias.shape == weight.shape[:1]


def product(name: str) -> torch._ops.OpOverload:
    """Return the operator `states weight^T + bias` that the kernel of this name computes.

    It takes what `may_multiply` allows: states [R, K]; weight [N, K]; bias [N] or None; returns
    [R, N].
    """

    @operator(name)
    def multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        states = states.contiguous()
        out = states.new_empty(len(states), len(weight))
        bias = None if bias is None else bias.contiguous()
        getattr(kernels(), name)(
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

    @fake_of(multiply)
    def _(states: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
        return states.new_empty(len(states), len(weight))

    @register_flop_formula(getattr(torch.ops.longhaul, name))
    def _(states: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * states[0] * math.prod(weight)

    has_no_gradient(multiply, "it is for inference")
    return multiply
