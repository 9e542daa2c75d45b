"""Many rows times weights on CPUs: what an encoder is made of.

`csrc/gemm.cpp`, compiled when the package is installed, does it in float32 and bfloat16 where the
CPU has AVX-512, without passes of their own to widen and to round; `ops/linear.py` says when it is
the faster way.
Shape letters: R rows, N weights, K their length.
"""

from torch import Tensor

from longformer_core.ops.cpu.features import kernels
from longformer_core.ops.cpu.linear_op import may_multiply, product

# Lengths and numbers of weights are whole numbers of these: what is loaded at once.
_LANES = 16

_multiply = product("many_rows_linear")


def can_multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether `multiply` takes these; see `linear_op.may_multiply`."""
    if len(weight) % _LANES or not may_multiply(states, weight, bias, multiple=_LANES):
        return False
    return kernels() is not None


def multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `states weight^T + bias`, summed in float32 and rounded once.

    A row of the result depends on that row alone, to the bit.
    Shapes: states [R, K]; weight [N, K]; bias [N]; returns [R, N].
    """
    out: Tensor = _multiply(states, weight, bias)
    return out
