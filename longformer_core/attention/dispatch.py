"""Which implementation computes attention: one decision for the window, the rows and the decoder.

By device, dtype and head size, never by what is in the tensors; said once in the log.
"""

import logging
import os
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from longformer_core.errors import ConfigError, log_once

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "reference", "blocked", "fused"]
# What the Triton kernels take.
_FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FUSED_HEAD_DIMS = (16, 128)
_FUSED_CAPABILITY = (8, 0)


def choose(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the implementation that computes tensors like these: never "auto".

    Raises: ConfigError for an unknown implementation, and for "fused" where it cannot run.
    """
    if implementation not in get_args(Implementation):
        raise ConfigError(
            f"there is no implementation {implementation!r}; choose one of "
            f"{list(get_args(Implementation))}"
        )
    if implementation in ("blocked", "reference"):
        return implementation
    chosen: str = _choose(implementation, device, dtype, head_dim)
    return chosen


def _choose(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return "fused" or "blocked" for "auto", and "fused" for itself, if it can run."""
    reason = _why_not_fused(device, dtype, head_dim)
    if implementation == "fused":
        # Triton's interpreter runs kernels on any device; nobody wants that by default.
        if reason and not (device.type == "cpu" and _is_interpreted()):
            raise ConfigError(f"the fused attention cannot run: {reason}; leave it to 'auto'")
        return "fused"
    if reason:
        level = logging.WARNING if device.type == "cuda" else logging.INFO
        log_once(logger, level, f"attention is blocked, without Triton: {reason}")
        return "blocked"
    log_once(logger, logging.INFO, f"attention is fused, by Triton kernels, on {device.type}")
    return "fused"


# A compiled graph takes the choice as it is. What `torch.compiler.assume_constant_result` does, but
# that imports torch's compiler, half of the time in which a process with this package starts.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not_fused(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"kernels need a CUDA device, the tokens are on {device.type}"
    if find_spec("triton") is None:
        return "kernels need the package triton, which is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _FUSED_CAPABILITY:
        return f"kernels need compute capability 8.0, this device has {capability}"
    if dtype not in _FUSED_DTYPES:
        return f"kernels take {', '.join(map(str, _FUSED_DTYPES))}, not {dtype}"
    if not _FUSED_HEAD_DIMS[0] <= head_dim <= _FUSED_HEAD_DIMS[1]:
        return f"kernels take head dimensions of 16 to 128, not {head_dim}"
    return None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
