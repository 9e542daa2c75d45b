"""Which rows read which keys, as the kernels of `few_queries.py` are told; without Triton.

Shape letters: S segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

# Programs that a launch is cut into: four for each multiprocessor of the largest GPUs, because what
# limits them is how many bytes are under way at once.
_PROGRAMS = 4 * 132
# Keys of one program: fewer are not worth its share of the sum at the end, and with more the last
# programs of a large launch have the GPU for themselves for too long. With several tiles of rows
# there are programs enough, and each split costs another copy of all rows.
_LEAST_KEYS = 256
_MOST_KEYS = 2048


class Segment(NamedTuple):
    """Some rows that lie together, and the keys that they read; what a row of the table holds.

    Keys lie in [B, H, n, D]: `batch` and `first_key` say where they start. `num_slots` counts the
    keys with the padding behind them, which gets a gradient of zeros.
    """

    first_row: int
    num_rows: int
    batch: int
    first_key: int
    num_keys: int
    num_slots: int


@dataclass(frozen=True)
class Segments:
    """All segments of a call: on the device as a table, and in Python what plans the launch.

    Nothing here depends on values on the device, so a recorded step may use it.
    Shapes: table int64 [S, 6], each row a `Segment`.
    num_rows: of all segments; most_rows, most_keys, most_slots: of one. num_keys: of the segments
        with rows. num_pairs: scores of one head.
    """

    table: Tensor
    num_rows: int
    most_rows: int
    num_keys: int
    most_keys: int
    most_slots: int
    num_pairs: int

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "Segments":
        """Describe these segments, whose rows are all rows of a call, in this order."""
        read = [segment for segment in segments if segment.num_rows]
        return cls(
            table=torch.tensor(segments, dtype=torch.int64, device=device).view(-1, 6),
            num_rows=sum(segment.num_rows for segment in segments),
            most_rows=max((segment.num_rows for segment in read), default=0),
            num_keys=sum(segment.num_keys for segment in read),
            most_keys=max((segment.num_keys for segment in read), default=0),
            most_slots=max((segment.num_slots for segment in segments), default=0),
            num_pairs=sum(segment.num_rows * segment.num_keys for segment in read),
        )

    @classmethod
    def packed(
        cls, num_rows: Sequence[int], lengths: Sequence[int], device: torch.device
    ) -> "Segments":
        """Describe documents whose rows, and whose keys, lie one after another."""
        rows, keys = accumulate(num_rows, initial=0), accumulate(lengths, initial=0)
        return cls.of(
            [
                Segment(first_row, count, 0, first_key, length, length)
                for first_row, count, first_key, length in zip(
                    rows, num_rows, keys, lengths, strict=False
                )
            ],
            device,
        )

    @classmethod
    def padded(cls, lengths: Sequence[int], num_slots: int, device: torch.device) -> "Segments":
        """Describe one row each for documents that are padded to `num_slots` keys."""
        return cls.of(
            [Segment(slot, 1, slot, 0, length, num_slots) for slot, length in enumerate(lengths)],
            device,
        )

    @property
    def planned(self) -> tuple[int, ...]:
        """Return all but the table, in the order of the fields: an operator takes numbers only."""
        return (
            self.num_rows,
            self.most_rows,
            self.num_keys,
            self.most_keys,
            self.most_slots,
            self.num_pairs,
        )

    def keys_per_program(self, num_heads: int, num_tiles: int, step: int) -> int:
        """Return how many keys of a segment one program reads for a tile of its rows."""
        share = -(-self.num_keys * num_heads * num_tiles // _PROGRAMS)
        chosen = min(max(share, _LEAST_KEYS), _MOST_KEYS * num_tiles)
        return -(-chosen // step) * step
