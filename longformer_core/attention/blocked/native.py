"""Blocked attention's forward pass on CPUs, by a kernel of our own.

`ops/cpu/csrc/window.cpp`, compiled when the package is installed, computes what `attention.py` does
in one pass, in float32 and bfloat16, where the CPU has AVX-512.
Shape letters: T packed tokens, H heads, D head dimension.
"""

from array import array
from itertools import accumulate, chain

import torch
from torch import Tensor

from longformer_core.attention.blocked.plan import Call
from longformer_core.ops.cpu.features import has_amx, kernels

# Head dimensions: whole numbers of what is loaded at once, and the most that there is room for.
_LANES = 16
_WIDEST = 128


def can_attend(call: Call, q: Tensor) -> bool:
    """Tell whether `attend` takes tensors like this one, all of one shape and dtype.

    Not where instructions for matrices multiply 16 bits: there torch's own may be the faster one.
    """
    if not q.is_cpu or q.dtype not in (torch.float32, torch.bfloat16):
        return False
    if q.dtype == torch.bfloat16 and has_amx():
        return False
    if q.shape[2] % _LANES or not 0 < q.shape[2] <= _WIDEST or call.dropout[0]:
        return False
    is_plain = call.dilation == 1 and call.strand.is_valid is None
    return is_plain and kernels() is not None


def attend(call: Call, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None) -> Tensor:
    """Return the rows of one call; their lse goes to `lse`, if that is wanted.

    A document's rows depend on that document alone, to the bit.
    Shapes: q, k, v [T, H, D]; lse [T, H, 1] float32, contiguous; returns [T, H, D].
    """
    compiled = kernels()
    assert compiled is not None
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    layout = call.layout
    starts = array("q", layout.cu_seqlens)
    global_starts = array("q", accumulate(layout.num_globals, initial=0))
    global_positions = array("q", chain.from_iterable(layout.global_positions))
    compiled.window_attend(
        *(x.data_ptr() for x in (q, k, v, out)),
        0 if lse is None else lse.data_ptr(),
        *(numbers.buffer_info()[0] for numbers in (starts, global_starts, global_positions)),
        layout.num_documents,
        *q.shape[1:],
        call.radius,
        call.is_causal,
        call.scale,
        q.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out
