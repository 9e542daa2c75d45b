"""Row-wise work on many packed tokens, a chunk of rows at a time.

Shape letters: T packed tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# On CPUs the widest states of a layer then stay in memory that is warm and taken once; a GPU needs
# more rows to be busy.
_ROWS = {"cpu": 2048}
_ROWS_ELSEWHERE = 8192


def most_rows(device: torch.device) -> int:
    """Return how many rows `in_chunks` takes at once."""
    return _ROWS.get(device.type, _ROWS_ELSEWHERE)


def in_chunks(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Return `function(*rows)`, each of whose rows depends on the same row of the inputs alone.

    Whole where a gradient may be wanted, which keeps what is inside anyway, and where it is
    compiled.
    Shapes: rows [T, ..] each; `function` returns [T, ..].
    """
    num_rows, size = len(rows[0]), most_rows(rows[0].device)
    if num_rows <= size or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*rows)
    out: Tensor | None = None
    for first in range(0, num_rows, size):
        part = function(*(x[first : first + size] for x in rows))
        if out is None:
            out = part.new_empty(num_rows, *part.shape[1:])
        out[first : first + size] = part
    assert out is not None
    return out
