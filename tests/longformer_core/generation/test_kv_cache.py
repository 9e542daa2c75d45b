"""The decoder's cache against a plain list of each row's keys and values."""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from longformer_core.errors import ShapeError
from longformer_core.generation.kv_cache import BeamKVCache

HEADS, DIM, MAX_STEPS = 2, 4, 64


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


def make(
    num_documents: int,
    rows_per_document: int,
    *,
    is_speculative: bool = False,
    has_fixed_shapes: bool = False,
) -> BeamKVCache:
    cache = BeamKVCache(
        1,
        rows_per_document,
        HEADS,
        DIM,
        is_speculative=is_speculative,
        has_fixed_shapes=has_fixed_shapes,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.add([MAX_STEPS] * num_documents)
    return cache


def step(cache: BeamKVCache, plain: PlainRows, seed: int, broken_rows: Sequence[int] = ()) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, len(plain.rows), HEADS, DIM, generator=generator)
    for tensor in (k, v):
        tensor[list(broken_rows)] = torch.nan
    cache.begin_step()
    if len(plain.rows):
        out, expected = cache.attend(0, q, k, v), plain.attend(q, k, v)
        torch.testing.assert_close(out, expected, equal_nan=True)


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
            cache.add([MAX_STEPS] * joins[number])
            plain.rows += [[] for _ in range(3 * joins[number])]
        assert cache.num_rows == len(plain.rows)
    assert len(plain.rows) == 6


def test_rows_of_one_text_see_those_before_them_and_only_what_is_kept() -> None:
    """Each step adds three tokens to a text, of which the first one, two or three stay."""
    cache = make(2, 3, is_speculative=True)
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


@pytest.mark.parametrize("rows_per_document", [1, 2, 4])
@pytest.mark.parametrize("has_fixed_shapes", [False, True])
def test_long_random_lives_of_documents(has_fixed_shapes: bool, rows_per_document: int) -> None:
    """Any documents leave in any order, some of them full of NaN, and others take their slots."""
    pick, b = random.Random(int(has_fixed_shapes)), rows_per_document
    cache, plain = make(0, b, has_fixed_shapes=has_fixed_shapes), PlainRows(0)
    limits: list[int] = []
    for number in range(120):
        for _ in range(pick.choice([0, 0, 1, 3]) if len(limits) < 12 else 0):
            limits.append(pick.choice([1, 5, 20, 60]))
            cache.add(limits[-1:])
            plain.rows += [[] for _ in range(b)]
        doomed = [i for i in range(len(limits)) if pick.random() < 0.05]
        step(cache, plain, number, [b * i + row for i in doomed for row in range(b)])
        order = [b * i + pick.randrange(b) for i in range(len(limits)) for _ in range(b)]
        if number % 3 == 0:
            cache.reorder(torch.tensor(order, dtype=torch.int64))
            plain.reorder(order)
        lengths = [len(history) for history in plain.rows[::b]]
        staying = [i for i in range(len(limits)) if i not in doomed and lengths[i] < limits[i]]
        if number % 40 == 39:
            staying = staying[:1]
        if pick.random() < 0.3:
            pick.shuffle(staying)
        limits = [limits[i] for i in staying]
        cache.select(staying)
        plain.reorder([b * i + row for i in staying for row in range(b)])
        needed = len(limits) * b * max(limits, default=0) * HEADS * DIM * 4 * 2
        mask = len(limits) * b * max(limits, default=0) * b * 4
        assert cache.num_bytes <= 2 * (needed + mask)


def test_what_a_document_leaves_behind_does_not_reach_the_next_one() -> None:
    cache, plain = make(2, 1), PlainRows(2)
    step(cache, plain, 0)
    q = torch.full((2, HEADS, DIM), torch.nan)
    cache.begin_step()
    cache.attend(0, q, q, q)
    cache.select([])
    cache.add([MAX_STEPS] * 2)
    fresh = PlainRows(2)
    step(cache, fresh, 1)
    # One document three tokens ahead, so that the other's masked slots are read too.
    fresh.rows[0] = []
    cache.select([1])
    cache.add([MAX_STEPS])
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


def test_a_document_that_has_taken_its_steps_is_named() -> None:
    cache, plain = make(1, 2), PlainRows(4)
    cache.add([1])
    step(cache, plain, 0)
    with pytest.raises(ShapeError, match="document 1 has taken the 1 steps"):
        cache.begin_step()
