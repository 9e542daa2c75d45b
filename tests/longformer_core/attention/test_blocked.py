"""Blocked attention against the dense definition in float64.

Blocks are made small here, so that short documents have first, inner and last blocks.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longformer_core.attention import blocked, window_attention
from longformer_core.attention.band import Band
from longformer_core.attention.reference import visible_keys
from longformer_core.layout import Layout

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTH, RADIUS = 40, 4
# Where the global tokens of a 40-token document lie; a window from token 20 spans 16 to 24.
GLOBALS: dict[str, list[int]] = {
    "none": [],
    "first": [0],
    "inside": [18],
    "edge": [16, 24],
    "one past": [15, 25],
    "adjacent": [19, 20, 21],
    "last": [39],
    "all": list(range(LENGTH)),
}


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_BLOCK", {"cpu": 8})
        patch.setattr(blocked, "_WHOLE", 12)
        patch.setattr(blocked, "_JOINED_RADIUS", 8)
        patch.setattr(blocked, "_JOINED_BLOCK", 4)
        # Three blocks at once, at a radius of 4 and without global tokens.
        patch.setattr(blocked, "_JOINED_BYTES", 3 * 4 * 4 * 12)
        yield


def draw(num_tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, num_tokens, 2, 4, generator=generator, dtype=torch.float64)
    return (q * 2).to(dtype), (k * 2).to(dtype), v.to(dtype)


def run(
    inputs: tuple[Tensor, ...], layout: Layout, radius: int, implementation: Any
) -> list[Tensor]:
    """The output, and the gradients of a sum of it with unequal weights."""
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    out = window_attention(q, k, v, layout, radius, implementation=implementation)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    out.backward(weights.to(out.dtype))
    grads = [x.grad for x in (q, k, v)]
    return [out.detach(), *(grad for grad in grads if grad is not None)]


def check(layout: Layout, radius: int, dtype: torch.dtype, seed: int = 0) -> None:
    """Hold the rule: error at most twice that of the plain way in the same dtype."""
    inputs = draw(layout.num_tokens, dtype, seed)
    oracle = run(tuple(x.double() for x in inputs), layout, radius, "reference")
    eager = run(inputs, layout, radius, "reference")
    mine = run(inputs, layout, radius, "blocked")
    assert len(mine) == 4
    for theirs, plain, ours in zip(oracle, eager, mine, strict=True):
        assert ours.dtype == dtype
        limit = 2 * (plain.double() - theirs).abs().max() + 1e-6 * theirs.abs().max()
        assert (ours.double() - theirs).abs().max() <= limit
    with torch.no_grad():
        assert torch.equal(window_attention(*inputs, layout, radius), mine[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", GLOBALS.values(), ids=GLOBALS)
def test_a_global_key_counts_once_wherever_it_lies(
    positions: list[int], dtype: torch.dtype
) -> None:
    check(Layout.from_lengths([LENGTH, 5], [positions, []]), RADIUS, dtype)


@pytest.mark.parametrize("radius", [1, 3, 8, 9, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents_of_any_length_share_a_batch(radius: int, dtype: torch.dtype) -> None:
    lengths = [0, 1, 2, 7, 8, 9, 12, 13, 0, 31, 64]
    check(Layout.from_lengths(lengths, [[0][:n] for n in lengths]), radius, dtype)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_invalid_tokens_are_no_keys_and_give_zeros(share: float, dtype: torch.dtype) -> None:
    valid = torch.rand(50, generator=torch.Generator().manual_seed(1)) < share
    layout = Layout.from_lengths([30, 20], [[0, 3, 29], [5]], valid)

    check(layout, RADIUS, dtype)

    out = window_attention(*draw(50, dtype), layout, RADIUS)
    assert out[~valid].abs().sum() == 0
    assert (out[valid].abs().sum((1, 2)) > 0).all()


@st.composite
def layouts(data: st.DrawFn) -> Layout:
    lengths = data(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    positions = [
        data(st.lists(st.integers(0, n - 1), max_size=n, unique=True)) if n else [] for n in lengths
    ]
    valid = data(st.none() | st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    flags = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    return Layout.from_lengths(lengths, positions, flags)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layout=layouts(), radius=st.integers(1, 45), dtype=st.sampled_from(DTYPES))
def test_any_batch(layout: Layout, radius: int, dtype: torch.dtype) -> None:
    if layout.num_tokens:
        check(layout, radius, dtype)


def test_a_batch_without_tokens_gives_none() -> None:
    q, k, v = draw(0, torch.float32)

    assert window_attention(q, k, v, Layout.from_lengths([0, 0]), 2).shape == (0, 2, 4)


def test_published_block_sizes() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_BLOCK", {"cpu": 128})
        patch.setattr(blocked, "_WHOLE", 256)
        patch.setattr(blocked, "_JOINED_RADIUS", 128)
        patch.setattr(blocked, "_JOINED_BLOCK", 32)
        patch.setattr(blocked, "_JOINED_BYTES", 2**23)
        check(Layout.from_lengths([700, 256, 257], [[0, 350], [255], []]), 100, torch.float32)


def test_a_document_does_not_depend_on_its_neighbours() -> None:
    q, k, v = draw(100, torch.float32)
    layout = Layout.from_lengths([30, 50, 20], [[0], [0, 49], []])
    hurt = [x.clone() for x in (q, k, v)]
    for x in hurt:
        x[:30], x[80:] = torch.nan, torch.inf

    out = window_attention(*hurt, layout, RADIUS)

    assert torch.equal(out[30:80], window_attention(q, k, v, layout, RADIUS)[30:80])


def test_inputs_that_are_views() -> None:
    """As a fused projection hands them out."""
    layout = Layout.from_lengths([35, 25], [[0, 20], [24]])
    together = torch.stack(draw(60, torch.float64), 1)
    views = tuple(together.unbind(1))
    assert not views[0].is_contiguous()
    for ours, theirs in zip(
        run(tuple(x.contiguous() for x in views), layout, RADIUS, "blocked"),
        _through_views(together, layout),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def _through_views(together: Tensor, layout: Layout) -> list[Tensor]:
    together = together.clone().requires_grad_()
    q, k, v = together.unbind(1)
    out = window_attention(q, k, v, layout, RADIUS)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    assert together.grad is not None
    return [out.detach(), *together.grad.unbind(1)]


def test_gradcheck() -> None:
    valid = torch.ones(14, dtype=torch.bool)
    valid[[3, 12]] = False
    layout = Layout.from_lengths([10, 4], [[0, 6], []], valid)
    inputs = [x[:, :1, :3].contiguous().requires_grad_() for x in draw(14, torch.float64)]

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        torch.manual_seed(7)
        return window_attention(q, k, v, layout, 2, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, 0.3), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_takes_its_share_and_keeps_the_mean(dtype: torch.dtype) -> None:
    layout = Layout.from_lengths([30, 9], [[0, 17], [3]])
    q, k, _ = draw(39, dtype)
    # With values of one, a row is the sum of its probabilities.
    ones = torch.ones_like(q)
    torch.manual_seed(0)
    draws = [window_attention(q * 0, k, ones, layout, RADIUS, dropout_p=0.25) for _ in range(400)]
    sums = torch.stack(draws)[..., 0].double()
    num_keys = torch.tensor([int(n) for n in _visible_counts(layout)])
    torch.testing.assert_close(
        sums.mean(0), torch.ones(39, 2, dtype=torch.float64), rtol=0, atol=0.08
    )
    # Each key is kept with chance 3/4 and weighs 4/3: the variance of a mean of n such draws.
    expected = (1 / 3 / num_keys).double()[:, None].expand(39, 2)
    torch.testing.assert_close(sums.var(0), expected, rtol=0.45, atol=0)
    assert torch.equal(
        window_attention(q, k, ones, layout, RADIUS, dropout_p=0.0),
        window_attention(q, k, ones, layout, RADIUS),
    )


def _visible_counts(layout: Layout) -> list[int]:
    counts = []
    for length, positions in zip(layout.lengths, layout.global_positions, strict=True):
        counts += visible_keys(length, Band.of(RADIUS, 1), positions, None)[0].sum(1).tolist()
    return counts


def test_nothing_of_the_size_of_the_window_is_kept() -> None:
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    layout = Layout.from_lengths([400], [[0]])
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.requires_grad_() for x in draw(400, dtype))
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            window_attention(q, k, v, layout, 64)
        assert kept
        assert sum(kept) <= 5 * q.nbytes
