"""Operators of our own: single nodes of graphs, seen by profilers, flop counters and modes."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def operator(name: str) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Return a decorator that makes an operator of a function of tensors and numbers.

    As `torch.library.custom_op` does, whose operators, when first called, import torch's compiler:
    that takes more than a second of every process, which then waits with its first document. The
    operator changes none of its inputs, and no result is one of them.
    """
    qualified = f"longhaul::{name}"

    def make(function: Callable[..., Any]) -> torch._ops.OpOverload:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "default", function)
        made: torch._ops.OpOverload = getattr(torch.ops.longhaul, name).default
        return made

    return make


def fake_of(made: torch._ops.OpOverload) -> Callable[[_Function], _Function]:
    """Return a decorator for what makes an operator's results without values, for graphs."""
    decorator: Callable[[_Function], _Function] = torch.library.register_fake(made)
    return decorator


def has_no_gradient(made: torch._ops.OpOverload, reason: str) -> None:
    """Let an operator refuse to be differentiated: torch would only warn, and take it for constant.

    Raises: when its gradient is asked for, NotImplementedError, as torch's own without one do.
    """

    def refuse(*_: Any) -> None:
        raise NotImplementedError(f"{made} has no gradient: {reason}")

    torch.library.register_autograd(made, refuse)
