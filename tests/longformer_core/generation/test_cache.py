"""The decoder's cache against a plain list of each row's keys and values."""

import math

import torch
from torch import Tensor

from longformer_core.generation.cache import DecoderCache

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


def make(num_documents: int, rows_per_document: int, *, is_run: bool = False) -> DecoderCache:
    cache = DecoderCache(
        1,
        rows_per_document,
        HEADS,
        DIM,
        is_run=is_run,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.add(num_documents)
    return cache


def step(cache: DecoderCache, plain: PlainRows, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, len(plain.rows), HEADS, DIM, generator=generator)
    cache.begin_step()
    torch.testing.assert_close(cache.attend(0, q, k, v), plain.attend(q, k, v))


def test_beams_that_swap_histories_and_documents_that_come_and_go() -> None:
    cache, plain = make(3, 3), PlainRows(9)
    orders = {
        1: [0, 0, 0, 4, 3, 5, 7, 7, 8],
        4: [2, 1, 2, 3, 3, 4, 6, 8, 7],
        30: [2, 0, 1, 3, 5, 5],
    }
    stays = {8: [2, 0], 12: [1], 20: [0, 1, 3, 4], 35: []}
    joins = {10: 2, 15: 4, 25: 1, 35: 2}
    for number in range(45):
        step(cache, plain, number)
        if number in orders:
            order = orders[number] + list(range(len(orders[number]), len(plain.rows)))
            cache.reorder(torch.tensor(order))
            plain.reorder(order)
        if number in stays:
            cache.select(stays[number])
            plain.reorder([3 * document + row for document in stays[number] for row in range(3)])
        if number in joins:
            cache.add(joins[number])
            plain.rows += [[] for _ in range(3 * joins[number])]
        assert cache.num_rows == len(plain.rows)
    assert len(plain.rows) == 6


def test_rows_of_one_text_see_those_before_them_and_only_what_is_kept() -> None:
    """Each step adds three tokens to a text, of which the first one, two or three stay."""
    cache = make(2, 3, is_run=True)
    texts = [PlainRows(1), PlainRows(1)]
    generator = torch.Generator().manual_seed(0)
    for kept in ([3, 1], [1, 1], [2, 3], [1, 2], [3, 3]):
        q, k, v = torch.randn(3, 6, HEADS, DIM, generator=generator)
        cache.begin_step()
        out = cache.attend(0, q, k, v)
        for document, text in enumerate(texts):
            rows = range(3 * document, 3 * document + 3)
            expected = [text.attend(q[[row]], k[[row]], v[[row]]) for row in rows]
            torch.testing.assert_close(out[list(rows)], torch.cat(expected))
            del text.rows[0][len(text.rows[0]) - 3 + kept[document] :]
        last = [3 * document + count - 1 for document, count in enumerate(kept)]
        cache.reorder(torch.tensor(last).repeat_interleave(3))


def test_what_a_document_leaves_behind_does_not_reach_the_next_one() -> None:
    cache, plain = make(2, 1), PlainRows(2)
    step(cache, plain, 0)
    q = torch.full((2, HEADS, DIM), torch.nan)
    cache.begin_step()
    cache.attend(0, q, q, q)
    cache.select([])
    cache.add(2)
    fresh = PlainRows(2)
    step(cache, fresh, 1)
    # One document three tokens ahead, so that the other's masked slots are read too.
    fresh.rows[0] = []
    cache.select([1])
    cache.add(1)
    fresh.reorder([1, 0])
    for number in range(3):
        step(cache, fresh, number)


def test_memory_grows_with_the_tokens_written() -> None:
    cache, plain = make(2, 1), PlainRows(2)
    assert cache.num_bytes == 0
    step(cache, plain, 0)

    assert 0 < cache.num_bytes < 2 * 1000 * HEADS * DIM * 4 * 2 / 10


def test_beams_and_documents_that_stay_never_move_keys_or_values() -> None:
    cache, plain = make(4, 2), PlainRows(8)
    step(cache, plain, 0)
    keys, second = cache._keys[0], cache._keys[0][1].clone()

    cache.reorder(torch.tensor([1, 0, 3, 3, 4, 4, 6, 7]))
    cache.select([3, 1])

    assert cache._keys[0] is keys
    assert torch.equal(cache._keys[0][1], second)
