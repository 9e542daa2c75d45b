"""What this machine's CPU can do, and what the kernels compiled for it may be given."""

import functools
import logging
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@functools.cache
def multiplies_bfloat16_slowly() -> bool:
    """Tell whether this machine's CPU multiplies float32 faster; said once in the log.

    Measured on Intel's; AMD's with instructions for bfloat16, and other architectures, are left to
    what was asked for.
    """
    has = torch.cpu.get_capabilities()
    is_amd = "AMD" in str(has.get("cpu_name", ""))
    is_slow = has.get("architecture") == "x86_64" and not (
        has.get("amx_bf16") or (is_amd and has.get("avx512_bf16"))
    )
    if is_slow:
        logger.info("this CPU has no AMX: products of many rows of bfloat16 are made in float32")
    return is_slow


def has_avx512() -> bool:
    """Tell whether it has what our kernels are compiled for."""
    has = torch.cpu.get_capabilities()
    return all(has.get(f"avx512_{part}", False) for part in ("f", "bw", "dq", "vl"))


@functools.cache
def kernels() -> ModuleType | None:
    """Return what was compiled of `kernels/`, None where it cannot run; said once in the log."""
    reason = "it has no AVX-512"
    if has_avx512():
        try:
            return import_module("longformer_core._kernels")
        except ImportError as error:
            reason = f"they were not compiled when the package was installed ({error})"
    logger.info("torch does what kernels of our own would do on this CPU: %s", reason)
    return None


def may_read(*tensors: Tensor) -> bool:
    """Tell whether kernels may compute of these: on the CPU, of one dtype that they know.

    Not where a gradient may be wanted, nor in a compiled graph, nor under autocast.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.bfloat16) or torch.is_autocast_enabled("cpu"):
        return False
    return all(x.dtype == dtype and x.is_cpu for x in tensors)


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


def multiply_by(
    name: str, states: Tensor, weight: Tensor, bias: Tensor | None, *options: object
) -> Tensor:
    """Return `states weight^T + bias` by the kernel of this name, which `may_multiply` allows.

    Shapes: states [R, K]; weight [N, K]; bias [N]; returns [R, N].
    """
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
        *options,
        torch.get_num_threads(),
    )
    return out
