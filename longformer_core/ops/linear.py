"""Products of tokens and weights: where all of a model's linear layers are computed.

Without AMX, oneDNN multiplies bfloat16 on Intel's CPUs at 0.6 of the speed of float32. So many rows
are multiplied in float32 there and rounded once, as accurate as a product in 16 bits with float32
sums. On AMD's, MKL multiplies float32 at half the speed of a kernel of ours, which does both
(`many_rows.py`). Few rows, which wait for their weights to be read, have kernels of their own too
(`few_rows.py`).
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from longformer_core.ops.chunking import in_chunks
from longformer_core.ops.cpu import decode as few_rows
from longformer_core.ops.cpu import gemm as many_rows
from longformer_core.ops.cpu.features import (
    kernels,
    multiplies_bfloat16_slowly,
    multiplies_float32_slowly,
)

# With fewer rows it takes longer to widen the weights than is gained.
_MANY_ROWS = 96


def linear(module: nn.Module, states: Tensor) -> Tensor:
    """Return `module(states)`, by the fastest way to the same numbers.

    Not where a gradient may be wanted, nor in a compiled graph, nor of a module that is more than a
    plain `nn.Linear` (see `is_plain_linear`).
    Shapes: states [..., d_in]; returns [..., d_out] in the dtype of the states.
    """
    if _is_slow_by_torch(module, states):
        return _multiply_many(states, module.weight, module.bias)
    return linear_as_stored(module, states)


def _multiply_many(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if many_rows.can_multiply(states, weight, bias):
        return many_rows.multiply(states, weight, bias)
    weight, bias = weight.float(), None if bias is None else bias.float()
    return in_chunks(
        lambda rows: functional.linear(rows.float(), weight, bias).to(rows.dtype), states
    )


def linear_as_stored(module: nn.Module, states: Tensor) -> Tensor:
    """Do the same with weights as they lie: heads have too many for another order to pay."""
    if is_plain_linear(module) and few_rows.can_multiply(states, module.weight, module.bias):
        return few_rows.multiply(states, module.weight, module.bias)
    out: Tensor = module(states)
    return out


def _is_slow_by_torch(module: nn.Module, states: Tensor) -> TypeGuard[nn.Linear]:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not states.is_cpu:
        return False
    if len(states) < _MANY_ROWS or torch.is_autocast_enabled("cpu"):
        return False
    if not _multiplies_slowly(states.dtype):
        return False
    return is_plain_linear(module) and module.weight.dtype == states.dtype


def _multiplies_slowly(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return multiplies_bfloat16_slowly()
    return dtype == torch.float32 and multiplies_float32_slowly()


def computing_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what products of many rows are computed in for inputs of this dtype."""
    is_slow = dtype == torch.bfloat16 and device.type == "cpu" and multiplies_bfloat16_slowly()
    return torch.float32 if is_slow else dtype


def held_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what encoders hold their states in, the widest among them, for weights of this dtype.

    Kernels widen a little at a time; torch widens whole states. (Kernels take widths that are
    multiples of 16; of others, on CPUs that widen, the answer is too small by half.)
    """
    return dtype if kernels() is not None else computing_dtype(dtype, device)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Tell whether a module is exactly `x W^T + b` with a local weight, so W may be used alone.

    False for subclasses, parametrizations, hooks, wrapped, quantized or sharded weights.
    """
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)
