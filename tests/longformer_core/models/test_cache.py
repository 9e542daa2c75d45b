"""The decoder's cache against a plain list of each row's keys and values."""

import math

import pytest
import torch
from torch import Tensor

from longformer_core.errors import ShapeError
from longformer_core.models.cache import DecoderCache

HEADS, DIM = 2, 4


class PlainRows:
    """Every row's history as tensors of its own."""

    def __init__(self, num_rows: int) -> None:
        self.rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_rows)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for row, history in enumerate(self.rows):
            history.append((k[row], v[row]))
            keys, values = (torch.stack(x) for x in zip(*history, strict=True))
            weights = torch.einsum("hd,nhd->hn", q[row], keys) / math.sqrt(DIM)
            out.append(torch.einsum("hn,nhd->hd", weights.softmax(-1), values).flatten())
        return torch.stack(out)

    def reorder(self, index: list[int]) -> None:
        self.rows = [list(self.rows[row]) for row in index]

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(history) for history in self.rows])


def make(num_rows: int, max_length: int = 64) -> DecoderCache:
    return DecoderCache(
        1, num_rows, HEADS, DIM, max_length, dtype=torch.float32, device=torch.device("cpu")
    )


def step(cache: DecoderCache, plain: PlainRows, rows_per_document: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, len(plain.rows), HEADS, DIM, generator=generator)
    cache.begin_step(plain.lengths, rows_per_document)
    torch.testing.assert_close(cache.attend(0, q, k, v), plain.attend(q, k, v))


def test_beams_that_swap_histories_and_documents_that_leave() -> None:
    cache, plain = make(9), PlainRows(9)
    orders = {
        1: [0, 0, 0, 4, 3, 5, 7, 7, 8],
        4: [2, 1, 2, 3, 3, 4, 6, 8, 7],
        20: [8, 6, 6, 0, 1, 1],  # the middle document leaves, the others change places
        30: [2, 0, 1],
    }
    for number in range(40):
        step(cache, plain, 3, number)
        if number in orders:
            cache = cache.reorder(torch.tensor(orders[number]))
            plain.reorder(orders[number])
            assert cache.num_rows == len(plain.rows)


def test_rows_at_different_steps() -> None:
    cache, plain = make(4), PlainRows(4)
    for number in range(3):
        step(cache, plain, 2, number)
    # Rows 2 and 3 start over from the beginning of a history that the first two left behind.
    cache.reorder(torch.tensor([0, 1, 0, 1]))
    plain.reorder([0, 1, 0, 1])
    plain.rows[2:] = [history[:1] for history in plain.rows[2:]]
    for number in range(3, 24):
        step(cache, plain, 2, number)


def test_reordering_before_the_first_step_sets_the_rows() -> None:
    cache = make(6).reorder(torch.tensor([0, 1]))

    step(cache, PlainRows(2), 1, 0)


def test_memory_grows_with_the_tokens_written() -> None:
    cache, plain = make(2, max_length=1000), PlainRows(2)
    assert cache.num_bytes == 0
    step(cache, plain, 1, 0)

    assert 0 < cache.num_bytes < 2 * 1000 * HEADS * DIM * 4 * 2 / 10


def test_beams_never_move_keys_or_values() -> None:
    cache, plain = make(4), PlainRows(4)
    step(cache, plain, 2, 0)
    keys = cache._keys[0]

    cache.reorder(torch.tensor([1, 0, 3, 3]))

    assert cache._keys[0] is keys


def test_what_does_not_fit_is_named() -> None:
    cache, plain = make(4, max_length=2), PlainRows(4)
    step(cache, plain, 2, 0)
    with pytest.raises(ShapeError, match="holds 2 rows per document, not 4"):
        cache.begin_step(plain.lengths, 4)
    with pytest.raises(ShapeError, match="3 rows step but the cache holds 4"):
        cache.begin_step(plain.lengths[:3], 2)
    with pytest.raises(ShapeError, match="mix histories"):
        cache.reorder(torch.tensor([0, 2]))
    with pytest.raises(ShapeError, match="mix histories"):
        cache.reorder(torch.tensor([0]))
    step(cache, plain, 2, 1)
    with pytest.raises(ShapeError, match="holds 2 tokens already and the cache was made for 2"):
        cache.begin_step(plain.lengths, 2)
