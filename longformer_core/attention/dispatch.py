"""Which implementation computes attention, and in what dtype: one decision for every caller.

By device, dtype and head size, never by what is in the tensors; said once in the log.
"""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from longformer_core.errors import ConfigError, ShapeError, log_once

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


def in_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three in the dtype of the autocast region, if they are in one, as products are.

    Like torch's own operators this leaves float64 alone. `torch.library.register_autocast` would
    not do: it casts to a dtype told at import, whatever the region's is.
    Raises: ShapeError when the dtypes differ.
    """
    device = q.device.type
    if _is_on(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(
            f"q, k, v are of {q.dtype}, {k.dtype}, {v.dtype}; all three must be of the same dtype: "
            "cast them, or call from within torch.autocast"
        )
    return q, k, v


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context where operators compute in the dtypes they are given, on x's device."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _is_on(device) else nullcontext()


# Asked once, for older compilers of torch cannot see through the question.
_WITH_REGIONS = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))


def _is_on(device: str) -> bool:
    return device in _WITH_REGIONS and torch.is_autocast_enabled(device)
