"""A packed batch described once and read by every layer.

Shape letters: B documents, T packed tokens, G global tokens of the whole batch.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, pairwise
from typing import TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from longformer_core.errors import ShapeError

_Plan = TypeVar("_Plan")
_ALIVE: "WeakValueDictionary[int, Layout]" = WeakValueDictionary()


def default_global_positions(length: int) -> tuple[int, ...]:
    """Return the positions that are global when the caller names none: the first token."""
    return (0,) if length else ()


@dataclass(frozen=True, eq=False)
class Layout:
    """Say where each document of a packed run of tokens lies and what its tokens are.

    A slot is an index into the packed run; a position counts from the document's first token.
    Python values serve the host's planning and the tensors serve the device, so that no layer has
    to wait for the device to learn a length.

    >>> from longformer_core import Layout
    >>> layout = Layout.from_lengths([3, 2], [[0], []])  # the first document's first is global
    >>> layout.cu_seqlens, layout.positions.tolist(), layout.global_index.tolist()
    ((0, 3, 5), [0, 1, 2, 0, 1], [0])

    Shapes: cu_seqlens B + 1 slots, as a tuple and as `offsets` (int32); positions [T] int64;
        global_index [G] int64 slots; is_valid and is_visible [T] bool, None when true of all.
    is_valid: the token is a key of the encoder's attention. An invalid token keeps its slot, for
        distances count it, but no token attends to it and its own attention output is zero.
    is_visible: the decoder may attend to the token.
    """

    cu_seqlens: tuple[int, ...]
    offsets: Tensor
    positions: Tensor
    global_positions: tuple[tuple[int, ...], ...]
    global_index: Tensor
    is_valid: Tensor | None
    is_visible: Tensor | None
    _plans: dict[Hashable, object] = field(default_factory=dict, repr=False)
    # Under this number compiled graphs name a layout: they pass tensors and numbers only.
    number: int = field(default_factory=count().__next__, repr=False)

    def __post_init__(self) -> None:
        _ALIVE[self.number] = self

    @staticmethod
    def of_number(number: int) -> "Layout":
        """Return the layout with this number, which must still be in use."""
        return _ALIVE[number]

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        global_positions: Sequence[Sequence[int]] | None = None,
        valid: Tensor | None = None,
        visible: Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> "Layout":
        """Describe documents of these lengths that lie one after another.

        global_positions: one list per document, in any order; a global token that is not valid
            counts as invalid only. None means that the batch has no global token.
        valid, visible: [T] flags; `visible` is `valid` when not given.
        Raises: ShapeError for negative lengths, positions outside their document, wrong counts.
        """
        if any(length < 0 for length in lengths):
            raise ShapeError(f"document lengths are {list(lengths)}; none may be negative")
        cu_seqlens = tuple(accumulate(lengths, initial=0))
        is_valid = _flags("valid", valid, cu_seqlens[-1], device)
        is_visible = (
            is_valid if visible is None else _flags("visible", visible, cu_seqlens[-1], device)
        )
        spans = list(pairwise(cu_seqlens))
        chosen = _global_positions(global_positions, lengths)
        if is_valid is not None and any(chosen):
            keep = is_valid.tolist()
            chosen = tuple(
                tuple(p for p in doc if keep[start + p])
                for (start, _), doc in zip(spans, chosen, strict=True)
            )
        slots = [start + p for (start, _), doc in zip(spans, chosen, strict=True) for p in doc]
        offsets = torch.tensor(cu_seqlens, dtype=torch.int32)
        starts = torch.repeat_interleave(offsets[:-1].long(), torch.tensor(lengths).long())
        return cls(
            cu_seqlens=cu_seqlens,
            offsets=offsets.to(device),
            positions=(torch.arange(cu_seqlens[-1]) - starts).to(device),
            global_positions=chosen,
            global_index=torch.tensor(slots, dtype=torch.int64, device=device),
            is_valid=is_valid,
            is_visible=is_visible,
        )

    @property
    def num_documents(self) -> int:
        """Return how many documents are packed, empty ones included."""
        return len(self.cu_seqlens) - 1

    @property
    def num_tokens(self) -> int:
        """Return T, the slots of the batch."""
        return self.cu_seqlens[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the slots of each document."""
        return tuple(end - start for start, end in pairwise(self.cu_seqlens))

    @property
    def num_globals(self) -> tuple[int, ...]:
        """Return the global tokens of each document."""
        return tuple(len(doc) for doc in self.global_positions)

    @property
    def device(self) -> torch.device:
        """Return where the tensors live."""
        return self.positions.device

    def plan(self, key: Hashable, build: Callable[[], _Plan]) -> _Plan:
        """Return what `build` made for this key, built on first use and shared by all layers."""
        if key not in self._plans:
            self._plans[key] = build()
        return cast(_Plan, self._plans[key])


def _flags(
    name: str, flags: Tensor | None, num_tokens: int, device: torch.device | str
) -> Tensor | None:
    if flags is None:
        return None
    if flags.shape != (num_tokens,):
        raise ShapeError(
            f"{name} has shape {list(flags.shape)}; give one flag per packed token, [{num_tokens}]"
        )
    flags = flags.to(device=device, dtype=torch.bool)
    return None if bool(flags.all()) else flags


def _global_positions(
    global_positions: Sequence[Sequence[int]] | None, lengths: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    if global_positions is None:
        return ((),) * len(lengths)
    if len(global_positions) != len(lengths):
        raise ShapeError(
            f"global positions are given for {len(global_positions)} documents but the batch has "
            f"{len(lengths)}; give one list per document, empty where there is none"
        )
    chosen = []
    for document, (positions, length) in enumerate(zip(global_positions, lengths, strict=True)):
        ordered = sorted({int(p) for p in positions})
        if ordered and not (ordered[0] >= 0 and ordered[-1] < length):
            bad = ordered[0] if ordered[0] < 0 else ordered[-1]
            raise ShapeError(
                f"document {document} has {length} tokens and cannot have a global token at "
                f"position {bad}; positions count from 0"
            )
        chosen.append(tuple(ordered))
    return tuple(chosen)
