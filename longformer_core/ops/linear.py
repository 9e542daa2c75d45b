"""Linear layers that choose what multiplies them: torch, or one of our kernels for CPUs.

Without AMX, oneDNN multiplies bfloat16 on Intel's CPUs at 0.6 of the speed of float32. So many rows
are multiplied in float32 there and rounded once, as accurate as a product in 16 bits with float32
sums. On AMD's, MKL multiplies float32 at half the speed of a kernel of ours, which does both
(`cpu/gemm.py`). The few rows of a decoder's step wait for their weights to be read, and have a
kernel of their own too (`cpu/decode.py`).
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from longformer_core.ops.chunking import in_chunks
from longformer_core.ops.cpu import decode, gemm
from longformer_core.ops.cpu.features import (
    kernels,
    may_read,
    multiplies_bfloat16_slowly,
    multiplies_float32_slowly,
)

# With fewer rows it takes longer to widen the weights than is gained.
_ROWS_OF_GEMM = 96


class _FoundAsLinear(type):
    """Lets tables of modules by exact type, as torch's quantizers have, find `Linear` as theirs."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is nn.Linear and cls is Linear)

    def __hash__(cls) -> int:
        return hash(nn.Linear) if cls is Linear else super().__hash__()


class Linear(nn.Linear, metaclass=_FoundAsLinear):
    """`nn.Linear`, computed by the fastest way to the same numbers.

    By torch alone where a gradient may be wanted, under autocast, in a compiled graph, and of a
    weight that is more than a local tensor: parametrized, quantized or sharded.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, by_gemm: bool = True
    ) -> None:
        """Make the layer as `nn.Linear` does.

        by_gemm: compute many rows by `ops.cpu.gemm`, or widened, where torch is slow. The
            projection to a vocabulary has too many weights for that to pay.
        """
        super().__init__(in_features, out_features, bias)
        self.by_gemm = by_gemm

    def forward(self, input: Tensor) -> Tensor:
        """Return [.., out_features] of [.., in_features], in the same dtype."""
        weight, bias = self.weight, self.bias
        if input.is_cpu and type(weight) is nn.Parameter and may_read(input, weight):
            if self.by_gemm and _is_slow_by_torch(input):
                if gemm.can_multiply(input, weight, bias):
                    return gemm.multiply(input, weight, bias)
                wide = (weight.float(), None if bias is None else bias.float())
                return in_chunks(
                    lambda rows: functional.linear(rows.float(), *wide).to(rows.dtype), input
                )
            if kernels() is not None and decode.can_multiply(input, weight, bias):
                return decode.multiply(input, weight, bias)
        return functional.linear(input, weight, bias)


def _is_slow_by_torch(states: Tensor) -> bool:
    if states.dim() != 2 or len(states) < _ROWS_OF_GEMM:
        return False
    is_wide = states.dtype == torch.float32
    return multiplies_float32_slowly() if is_wide else multiplies_bfloat16_slowly()


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Tell whether a module is exactly `x W^T + b` with a local weight, so W may be used alone.

    False for other subclasses, parametrizations, hooks, wrapped, quantized or sharded weights.
    """
    if type(module) not in (Linear, nn.Linear) or type(module.weight) is not nn.Parameter:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def widest_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what an encoder's widest states are held in, for weights of this dtype.

    Kernels widen a little at a time; torch, where its bfloat16 is slow, widens whole states.
    (Kernels take widths that are multiples of 16; of others, on CPUs that widen, the answer is too
    small by half.)
    """
    is_widened = dtype == torch.bfloat16 and device.type == "cpu" and multiplies_bfloat16_slowly()
    return torch.float32 if is_widened and kernels() is None else dtype
