"""Which blocks of queries and keys blocked attention computes: planned once for all layers.

A run is what is one document to the band, and a strand the packed tokens run by run. Without a
dilation that is the packed batch itself. With one, the band of a token holds tokens of its own
residue class only: the classes of a document, brought in order one after another, are runs of their
own that share the document's global columns. Heads of equal dilation are computed together.
Shape letters: T packed tokens, H heads, h those of one dilation, D head dimension, C queries and W
keys of a block, g globals of the document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from longformer_core.layout import Layout

# Queries of a block. Few keep the keys that no query of the block sees few; many keep the matrices
# large. Documents up to _WHOLE tokens are one block.
_BLOCK = {"cpu": 128}
_BLOCK_ELSEWHERE = 512
_WHOLE = 256
# Score rows are padded to this many columns when global columns make their length odd.
_ALIGN = 16


@dataclass(frozen=True)
class Block:
    """Places of a block's queries and keys, and its document's range in `Strand.global_index`.

    `masks_globals`: some query may not see some global column, or sees it in its band already.
    """

    queries: slice
    keys: slice
    globals: slice
    masks_globals: bool

    @property
    def num_queries(self) -> int:
        """Return C."""
        return int(self.queries.stop - self.queries.start)

    @property
    def num_keys(self) -> int:
        """Return W."""
        return int(self.keys.stop - self.keys.start)

    @property
    def num_globals(self) -> int:
        """Return g."""
        return int(self.globals.stop - self.globals.start)

    @property
    def row_length(self) -> int:
        """Return how long a row of scores is: W + g, and some where that is odd."""
        if not self.num_globals:
            return self.num_keys
        return -(-(self.num_keys + self.num_globals) // _ALIGN) * _ALIGN

    def of_queries(self, x: Tensor) -> Tensor:
        """Return the queries' part [H, C, D] of [T, H, D], as a view."""
        return x[self.queries].transpose(0, 1)

    def of_keys(self, x: Tensor, width: int | None = None) -> Tensor:
        """Return the keys' part [H, W, D] of [T, H, D], or `width` tokens, if there are so many."""
        first = self.keys.start
        last = self.keys.stop if width is None else first + width
        return x[first:last].transpose(0, 1)

    def of_globals(self, x: Tensor) -> Tensor:
        """Return the global tokens' part [H, g, D] of [G, H, D]."""
        return x[self.globals].transpose(0, 1)


@dataclass(frozen=True)
class Strand:
    """The packed tokens in an order in which the band of one dilation has no gaps.

    A run is what is one document to the band: the slots `first`, `first + step`, and so on.
    Shapes: order [T] has the slot at each place, None when that is the place itself; global_index
        [G] places, in the layout's order of global tokens; is_valid [T] by place.
    """

    runs: tuple["Run", ...]
    order: Tensor | None
    global_index: Tensor
    is_valid: Tensor | None

    @classmethod
    def of(cls, layout: Layout, dilation: int) -> "Strand":
        """Bring the tokens of a batch into order."""
        runs = tuple(_runs(layout, dilation))
        if dilation == 1:
            return cls(runs, None, layout.global_index, layout.is_valid)
        device = layout.device
        order = torch.cat([torch.arange(0), *map(_slots, runs)]).to(device)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=device)
        is_valid = None if layout.is_valid is None else layout.is_valid[order]
        return cls(runs, order, places[layout.global_index], is_valid)


def _slots(run: "Run") -> Tensor:
    return torch.arange(run.slots.start, run.slots.stop, run.slots.step)


@dataclass(frozen=True)
class Run:
    """The places of one run, its slots, its document's globals and their range among all."""

    start: int
    slots: range
    globals: tuple[int, ...]
    columns: slice

    @property
    def end(self) -> int:
        """Return the place after the last."""
        return self.start + len(self.slots)

    @property
    def global_places(self) -> list[int]:
        """Return the places of the globals that lie in the run."""
        return [self.start + self.slots.index(slot) for slot in self.globals if slot in self.slots]


def _runs(layout: Layout, dilation: int) -> Iterator[Run]:
    place = 0
    global_ends = accumulate(layout.num_globals)
    for (start, end), positions, global_end in zip(
        pairwise(layout.cu_seqlens), layout.global_positions, global_ends, strict=True
    ):
        columns = slice(global_end - len(positions), global_end)
        chosen = tuple(start + position for position in positions)
        for first in range(start, min(start + dilation, end)):
            run = Run(place, range(first, end, dilation), chosen, columns)
            yield run
            place = run.end


@dataclass(frozen=True)
class Call:
    """What is computed for the heads of one dilation, beside its tensors.

    `dropout` is a probability and a seed; `heads` is None when all have the dilation.
    """

    layout: Layout
    strand: Strand
    radius: int
    dilation: int
    heads: tuple[int, ...] | None
    num_heads: int
    is_causal: bool
    scale: float
    dropout: tuple[float, int]

    @property
    def ahead(self) -> int:
        """Return how many keys after itself a query sees in its band."""
        return 0 if self.is_causal else self.radius

    @property
    def blocks(self) -> list[Block]:
        """Return the plan that all layers with this band share."""
        key = ("blocks", self.radius, self.dilation, self.is_causal)
        return self.layout.plan(key, lambda: list(_blocks(self)))

    def pick(self, x: Tensor) -> Tensor:
        """Return the call's heads of [T, H, D], tokens by place; no copy where it is all of it."""
        order = self.strand.order
        x = x if self.heads is None else x[:, list(self.heads)]
        return x if order is None else x[order]

    def put(self, part: Tensor, out: Tensor) -> None:
        """Write what belongs to the call's heads, tokens by place, where `pick` took it from."""
        order = self.strand.order
        if self.heads is None:
            out[order] = part
        elif order is None:
            out[:, list(self.heads)] = part
        else:
            out[order[:, None], torch.tensor(self.heads, device=order.device)] = part


def calls_of(
    layout: int,
    radius: int,
    dilations: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: int,
) -> list[Call]:
    """Return the calls that together are the operation: one for each dilation."""
    of_number = Layout.of_number(layout)
    calls = []
    for index, dilation in enumerate(sorted(set(dilations))):
        heads = tuple(head for head, own in enumerate(dilations) if own == dilation)
        # All layers with this dilation share the order of tokens.
        strand = of_number.plan(("strand", dilation), partial(Strand.of, of_number, dilation))
        call = Call(
            layout=of_number,
            strand=strand,
            radius=radius,
            dilation=dilation,
            heads=None if len(heads) == len(dilations) else heads,
            num_heads=len(heads),
            is_causal=is_causal,
            scale=scale,
            # Blocks take the seeds from this one on; see `_Scores.kept`.
            dropout=(dropout_p, seed + index * of_number.num_tokens),
        )
        calls.append(call)
    return calls


def whole(calls: list[Call], parts: Sequence[Tensor | None]) -> Tensor:
    """Return the calls' parts [T, h, D] as one tensor [T, H, D], tokens by slot."""
    first = parts[0]
    assert first is not None
    if calls[0].heads is None and calls[0].strand.order is None:
        return first
    num_heads = sum(call.num_heads for call in calls)
    out = first.new_empty(first.shape[0], num_heads, first.shape[2])
    for call, part in zip(calls, parts, strict=True):
        assert part is not None
        call.put(part, out)
    return out


def most_queries(device: torch.device) -> int:
    """Return how many queries a block has at the most."""
    return max(_size_on(device), _WHOLE)


def _size_on(device: torch.device) -> int:
    return _BLOCK.get(device.type, _BLOCK_ELSEWHERE)


def _blocks(call: Call) -> Iterator[Block]:
    size = _size_on(call.layout.device)
    for run in call.strand.runs:
        places = run.global_places
        step = len(run.slots) if len(run.slots) <= _WHOLE else size
        for first in range(run.start, run.end, max(step, 1)):
            last = min(first + step, run.end)
            low, high = max(run.start, first - call.radius), min(run.end, last + call.ahead)
            in_band = any(low <= place < high for place in places)
            # A causal query does not see the globals after it; the first one has the most of them.
            lies_after = call.is_causal and run.globals[-1:] > (run.slots[first - run.start],)
            yield Block(
                queries=slice(first, last),
                keys=slice(low, high),
                globals=run.columns,
                masks_globals=in_band or lies_after,
            )
