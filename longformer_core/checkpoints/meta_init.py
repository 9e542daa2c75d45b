"""Models without weights: their shapes alone, until the weights arrive."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Undrawn(TorchFunctionMode):
    """Leaves tensors as they are where a module would draw its weights.

    Nothing could be drawn into them; and torch, for trying, imports its compiler, which takes more
    than a second of every process.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def meta_init() -> Iterator[None]:
    """Let modules made within this block have tensors on the meta device, which take no memory."""
    with torch.device("meta"), _Undrawn():
        yield
