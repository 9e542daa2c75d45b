"""Blocked attention against the dense definition in float64.

Blocks are made small here, so that short documents have first, inner and last blocks.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longformer_core.attention import blocked, window_attention
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
        yield


def draw(num_tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, num_tokens, 2, 4, generator=generator, dtype=torch.float64)
    return (q * 2).to(dtype), (k * 2).to(dtype), v.to(dtype)


def check(layout: Layout, radius: int, dtype: torch.dtype, seed: int = 0) -> None:
    """Hold the rule: error at most twice that of the plain way in the same dtype."""
    q, k, v = draw(layout.num_tokens, dtype, seed)
    oracle = window_attention(
        q.double(), k.double(), v.double(), layout, radius, implementation="reference"
    )
    eager = window_attention(q, k, v, layout, radius, implementation="reference")
    limit = 2 * (eager.double() - oracle).abs().max() + 1e-6 * oracle.abs().max()
    for needs_grad in (False, True):
        out = window_attention(q.requires_grad_(needs_grad), k, v, layout, radius)
        assert out.dtype == dtype
        assert (out.double() - oracle).abs().max() <= limit


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
        check(Layout.from_lengths([700, 256, 257], [[0, 350], [255], []]), 100, torch.float32)


def test_a_document_does_not_depend_on_its_neighbours() -> None:
    q, k, v = draw(100, torch.float32)
    layout = Layout.from_lengths([30, 50, 20], [[0], [0, 49], []])
    hurt = [x.clone() for x in (q, k, v)]
    for x in hurt:
        x[:30], x[80:] = torch.nan, torch.inf

    out = window_attention(*hurt, layout, RADIUS)

    assert torch.equal(out[30:80], window_attention(q, k, v, layout, RADIUS)[30:80])


def test_gradients_are_those_of_the_definition() -> None:
    valid = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.7
    layout = Layout.from_lengths([35, 25], [[0, 20], [24]], valid)
    gradients = []
    for implementation in ("blocked", "reference"):
        inputs = [x.requires_grad_() for x in draw(60, torch.float64)]
        out = window_attention(*inputs, layout, RADIUS, implementation=implementation)  # type: ignore[arg-type]
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        gradients.append([x.grad for x in inputs])

    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
