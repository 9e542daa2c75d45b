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

    Intel's without AMX do; AMD's with instructions for bfloat16 multiply it four times as fast as
    float32 (Zen 5). Other architectures, unmeasured, are left to what was asked for.
    """
    has = torch.cpu.get_capabilities()
    is_slow = has.get("architecture") == "x86_64" and not (
        has_amx() or (_is_amd() and has.get("avx512_bf16"))
    )
    if is_slow:
        logger.info("this CPU has no AMX: products of many rows of bfloat16 are made in float32")
    return is_slow


@functools.cache
def multiplies_float32_slowly() -> bool:
    """Tell whether torch's library leaves AVX-512 out here, as MKL does on AMD's; said once."""
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    is_slow = _is_amd() and has_avx512() and bool(has_mkl)
    if is_slow:
        logger.info(
            "MKL uses no AVX-512 on this CPU: float32 is multiplied by our kernels if compiled"
        )
    return is_slow


def has_amx() -> bool:
    """Tell whether it has instructions for matrices of bfloat16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def _is_amd() -> bool:
    return "AMD" in str(torch.cpu.get_capabilities().get("cpu_name", ""))


def has_avx512() -> bool:
    """Tell whether it has what our kernels are compiled for."""
    has = torch.cpu.get_capabilities()
    return all(has.get(f"avx512_{part}", False) for part in ("f", "bw", "dq", "vl"))


@functools.cache
def kernels() -> ModuleType | None:
    """Return what was compiled of `csrc/`, None where it cannot run; said once in the log."""
    reason = "it has no AVX-512"
    if has_avx512():
        try:
            return import_module("longformer_core.ops.cpu._kernels")
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
