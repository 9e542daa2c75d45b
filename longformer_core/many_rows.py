"""Many rows of bfloat16 times weights on CPUs that multiply float32 faster.

What an encoder is made of. `kernels/many_rows.cpp`, compiled when the package is installed, does
it without passes of their own to widen and to round, where the CPU has AVX-512; `linear.py` says
when.
Shape letters: R rows, N weights, K their length.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longformer_core.cpu import kernels, may_multiply, multiply_by
from longformer_core.operators import fake_of, has_no_gradient, operator

# Lengths and numbers of weights are whole numbers of these: what is loaded at once.
_LANES = 16


def can_multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether `multiply` takes these; see `cpu.may_multiply`."""
    if states.dtype != torch.bfloat16 or len(weight) % _LANES:
        return False
    return may_multiply(states, weight, bias, multiple=_LANES) and kernels() is not None


def multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `states weight^T + bias`, summed in float32 and rounded once.

    A row of the result depends on that row alone, to the bit.
    Shapes: states [R, K]; weight [N, K]; bias [N]; returns [R, N].
    """
    out: Tensor = _multiply(states, weight, bias)
    return out


@operator("many_rows_linear")
def _multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return multiply_by("many_rows_linear", states, weight, bias)


@fake_of(_multiply)
def _(states: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
    return states.new_empty(len(states), len(weight))


@register_flop_formula(torch.ops.longhaul.many_rows_linear)
def _(states: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * states[0] * math.prod(weight)


has_no_gradient(_multiply, "it is for inference")
