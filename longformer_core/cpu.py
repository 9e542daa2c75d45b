"""What this machine's CPU can do, as far as it decides how something is computed."""

import functools
import logging

import torch

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
    """Tell whether it has what `few_rows.cpp` is compiled for."""
    has = torch.cpu.get_capabilities()
    return all(has.get(f"avx512_{part}", False) for part in ("f", "bw", "dq", "vl"))
