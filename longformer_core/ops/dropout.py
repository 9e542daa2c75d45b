"""Dropout with fewer random numbers: on CPUs drawing them is most of its cost."""

import torch
from torch import Tensor
from torch.nn import functional


def draw_kept(out: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill a contiguous tensor with 0, at the chance p, and 1 / (1 - p); return it.

    Four numbers of 16 bits share one draw of 64: on CPUs nine times as fast as `bernoulli_`.
    Numerics: `out` is of 32 bits or more; p in steps of 2**-16, the mean exactly that of the step.
    """
    dropped = round(p * 2**16)
    if dropped == 2**16:
        return out.zero_()
    bits = torch.empty(-(-out.numel() // 4), dtype=torch.int64, device=out.device)
    bits.random_(-(2**63), None, generator=generator)
    flat = out.view(-1).copy_(bits.view(torch.int16)[: out.numel()])
    flat.ge_(dropped - 2**15).mul_(2**16 / (2**16 - dropped))
    return out


def dropout(states: Tensor, p: float, training: bool) -> Tensor:
    """Return the states, in training with each number zero at the chance p and the others scaled.

    Where torch has a fused operator, on other devices and in compiled graphs, that one is used.
    """
    if not training or not p:
        return states
    if states.device.type != "cpu" or torch.compiler.is_compiling():
        return functional.dropout(states, p)
    wide = torch.promote_types(states.dtype, torch.float32)
    return states * draw_kept(torch.empty(states.shape, dtype=wide), p).to(states.dtype)
