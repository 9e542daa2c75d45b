"""The one dtype of a call's tensors, under torch.autocast and outside it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from longformer_core.errors import ShapeError


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
