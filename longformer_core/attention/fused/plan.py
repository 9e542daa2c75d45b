"""What the fused kernels are launched for: tiles of a batch, planned once for all layers.

Plain Python and tables on the device, without Triton.
Shape letters: T packed tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from longformer_core.attention.band import Band
from longformer_core.layout import Layout

# Global columns of a step where every document has few; elsewhere as many as there are other keys.
_FEW_GLOBALS = 16
# Going back, a document's queries are cut into parts for its global keys: of so many queries at
# least, and into so many at most for all chunks of global keys together.
_PART = 512
_MAX_PARTS = 64
# Numbers of a work item: first slot, tokens of its class, first of its tile, first and last + 1 of
# the other side's, first and last + 1 global of its document, and one to make rows 32 bytes.
ITEM = 8
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Work:
    """The tiles of one side of all documents, longest document first, and the other side of each.

    Shapes: items int32 [tiles, 8], as `ITEM` says; the first `num_plain` meet valid tokens only.
    num_pairs: scores computed for one head.
    """

    items: Tensor
    num_plain: int
    num_pairs: int

    @property
    def parts(self) -> Iterator[tuple[Tensor, bool]]:
        """Yield the items by whether they meet an invalid token."""
        yield self.items[: self.num_plain], False
        yield self.items[self.num_plain :], True


@dataclass(frozen=True)
class _Document:
    start: int
    end: int
    global_start: int
    global_end: int


@dataclass(frozen=True)
class Call:
    """What one call computes, beside its tensors; `dropout` is a probability and a seed."""

    layout: Layout
    band: Band
    scale: float
    dropout: tuple[float, int]

    @property
    def documents(self) -> list[_Document]:
        """Return the documents, longest first: what takes longest must not start last."""
        ends = accumulate(self.layout.num_globals)
        documents = [
            _Document(start, end, global_end - num_globals, global_end)
            for (start, end), num_globals, global_end in zip(
                pairwise(self.layout.cu_seqlens), self.layout.num_globals, ends, strict=True
            )
        ]
        return sorted(documents, key=lambda d: d.start - d.end)

    @property
    def head_groups(self) -> list[tuple[int, Tensor]]:
        """Return each dilation and its heads."""
        dilations = self.band.dilations
        groups = {d: [h for h, mine in enumerate(dilations) if mine == d] for d in dilations}
        return self.layout.plan(
            ("fused heads", dilations),
            lambda: [(d, self._table(heads)) for d, heads in groups.items()],
        )

    def chunk(self, many: int) -> int:
        """Return how many global columns are one step: none, few, or as many as asked for."""
        most = max(self.layout.num_globals, default=0)
        return 0 if not most else _FEW_GLOBALS if most <= _FEW_GLOBALS else many

    @property
    def most_keys(self) -> int:
        """Return how many keys a query sees at the most."""
        band = self.band
        width = band.radius + 1 if band.is_causal else 2 * band.radius + 1
        longest = max(self.layout.lengths, default=0)
        return min(width + max(self.layout.num_globals, default=0), longest)

    @property
    def valid(self) -> Tensor | None:
        """Return a byte for each token, None when all are valid."""
        is_valid = self.layout.is_valid
        return None if is_valid is None else is_valid.view(torch.uint8)

    @property
    def globals(self) -> Tensor:
        """Return the slots of the global tokens in 32 bits."""
        return self.layout.plan("fused global slots", lambda: self.layout.global_index.int())

    @property
    def ranks(self) -> Tensor:
        """Return for each token which global token it is, -1 for none: [T] int32."""
        return self.layout.plan("fused global ranks", self._ranks)

    def _ranks(self) -> Tensor:
        index = self.layout.global_index
        ranks = torch.full((self.layout.num_tokens,), -1, dtype=torch.int32, device=index.device)
        ranks[index] = torch.arange(len(index), dtype=torch.int32, device=index.device)
        return ranks

    def _table(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.layout.device)

    def work(self, tile: int, dilation: int, *, keys: bool = False) -> Work:
        """Return the tiles of queries and the keys of each; or, of `keys`, with the queries."""
        radius = self.band.radius
        ahead = 0 if self.band.is_causal else radius
        reach = (ahead, radius) if keys else (radius, ahead)
        name = ("fused", tile, dilation, *reach)
        return self.layout.plan(name, lambda: self._work(tile, dilation, *reach))

    def _work(self, tile: int, dilation: int, left: int, right: int) -> Work:
        num_valid = self._num_valid
        plain: list[tuple[int, ...]] = []
        mixed: list[tuple[int, ...]] = []
        num_pairs = 0
        for d in self.documents:
            for base in range(d.start, min(d.start + dilation, d.end)):
                length = -(-(d.end - base) // dilation)
                for first in range(0, length, tile):
                    end = min(first + tile, length)
                    low, high = max(0, first - left), min(length, end + right)
                    seen = base + low * dilation, base + (high - 1) * dilation + 1
                    own = base + first * dilation, base + (end - 1) * dilation + 1
                    columns = d.global_start, d.global_end
                    if num_valid(*own) == 0:
                        # Nobody in the tile sees or is seen: it only has to be filled with zeros.
                        (low, high), columns = (0, 0), (0, 0)
                    item = (base, length, first, low, high, *columns, 0)
                    is_plain = num_valid(*seen) == seen[1] - seen[0]
                    (plain if is_plain else mixed).append(item)
                    num_pairs += (end - first) * (high - low + columns[1] - columns[0])
        return Work(self._items(plain + mixed), len(plain), num_pairs)

    def _items(self, items: list[tuple[int, ...]]) -> Tensor:
        return self._table(items).view(-1, ITEM)

    def _num_valid(self, start: int, end: int) -> int:
        """Return how many of the slots are valid."""
        if self.layout.is_valid is None:
            return end - start
        counts = self.layout.plan("fused valid counts", self._valid_counts)
        return counts[end] - counts[start]

    def _valid_counts(self) -> list[int]:
        assert self.layout.is_valid is not None
        return list(accumulate(self.layout.is_valid.tolist(), initial=0))

    def global_work(self, chunk: int) -> tuple[Tensor, Tensor, int]:
        """Return what is done for global keys, for their sums, and how many rows lie between."""
        return self.layout.plan(("fused globals", chunk), lambda: self._global_work(chunk))

    def _global_work(self, chunk: int) -> tuple[Tensor, Tensor, int]:
        items, sums, num_rows = [], {}, 0
        for d in self.documents:
            num_globals, length = d.global_end - d.global_start, d.end - d.start
            chunks = range(d.global_start, d.global_end, chunk)
            if not chunks:
                continue
            num_parts = max(1, min(-(-length // _PART), _MAX_PARTS // len(chunks)))
            part = -(-length // num_parts)
            starts = range(0, length, part)
            for index, low in enumerate(starts):
                row = num_rows + index * num_globals - d.global_start
                items += [
                    (
                        d.start,
                        length,
                        low,
                        min(low + part, length),
                        first,
                        d.global_end,
                        row + first,
                    )
                    for first in chunks
                ]
            for g in range(d.global_start, d.global_end):
                sums[g] = (num_rows + g - d.global_start, num_globals, len(starts), 0)
            num_rows += len(starts) * num_globals
        table = self._table([sums[g] for g in sorted(sums)])
        return self._items([(*item, 0) for item in items]), table, num_rows

    @property
    def shared(self) -> dict[str, Any]:
        """Return the arguments that all kernels take, beside those of one launch."""
        return {
            "num_tokens": self.layout.num_tokens,
            "radius": self.band.radius,
            "CAUSAL": self.band.is_causal,
            **softmax_arguments(self.scale, self.dropout),
        }


def softmax_arguments(scale: float, dropout: tuple[float, int]) -> dict[str, Any]:
    """Return the arguments that say how scores become probabilities, and which are dropped.

    `dropout` is a chance and the seed of `philox.is_kept`.
    """
    p, seed = dropout
    return {
        "scale_log2": scale * _LOG2_E,
        "seed": seed,
        "threshold": min(int(p * 2**32), 2**32 - 1),
        # At a chance of 1 nothing is left to be scaled.
        "kept_scale": 1.0 / (1.0 - p) if p < 1.0 else 0.0,
        "HAS_DROPOUT": p > 0.0,
    }
