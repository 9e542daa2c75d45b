"""Blocked attention against the dense definition in float64.

Blocks are made small here, so that short documents have first, inner and last blocks, and memory
that nobody has written is NaN.
"""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longformer_core.attention import window_attention, window_attention_with_lse
from longformer_core.attention.band import Band
from longformer_core.attention.blocked import native, plan
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
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(plan, "_BLOCK", {"cpu": 8})
        patching.setattr(plan, "_WHOLE", 12)
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(
    num_tokens: int, dtype: torch.dtype, seed: int = 0, shape: tuple[int, int] = (2, 4)
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, num_tokens, *shape, generator=generator, dtype=torch.float64)
    return (q * 2).to(dtype), (k * 2).to(dtype), v.to(dtype)


def run(
    inputs: tuple[Tensor, ...], layout: Layout, radius: int, implementation: Any, **band: Any
) -> list[Tensor]:
    """The output, the gradients of a sum of it with unequal weights, and the lse."""
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    out, lse = window_attention_with_lse(
        q, k, v, layout, radius, implementation=implementation, **band
    )
    assert not lse.requires_grad
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    out.backward(weights.to(out.dtype))
    grads = [x.grad for x in (q, k, v)]
    return [out.detach(), *(grad for grad in grads if grad is not None), lse]


def check(
    layout: Layout,
    radius: int,
    dtype: torch.dtype,
    seed: int = 0,
    shape: tuple[int, int] = (2, 4),
    **band: Any,
) -> None:
    """Hold the rule: error at most twice that of the plain way in the same dtype."""
    inputs = draw(layout.num_tokens, dtype, seed, shape)
    oracle = run(tuple(x.double() for x in inputs), layout, radius, "reference", **band)
    eager = run(inputs, layout, radius, "reference", **band)
    mine = run(inputs, layout, radius, "blocked", **band)
    assert [x.dtype for x in mine] == [dtype] * 4 + [torch.promote_types(dtype, torch.float32)]
    # The lse of a row without keys is infinite in all three, and nothing else is.
    assert torch.equal(mine[4].isinf(), oracle[4].isinf())
    for each in (oracle, eager, mine):
        each[4] = each[4].masked_fill(each[4] == -torch.inf, 0.0)
    for theirs, plain, ours in zip(oracle, eager, mine, strict=True):
        assert ours.shape == theirs.shape
        limit = 2 * (plain.double() - theirs).abs().max() + 1e-6 * theirs.abs().max()
        assert (ours.double() - theirs).abs().max() <= limit
    with torch.no_grad(), patch.object(native, "can_attend", return_value=False):
        assert torch.equal(window_attention(*inputs, layout, radius, **band), mine[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", GLOBALS.values(), ids=GLOBALS)
def test_a_global_key_counts_once_wherever_it_lies(
    positions: list[int], dtype: torch.dtype
) -> None:
    check(Layout.from_lengths([LENGTH, 5], [positions, []]), RADIUS, dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])
@pytest.mark.parametrize("dilation", [2, 3, [1, 3], [4, 2]], ids=str)
@pytest.mark.parametrize("positions", GLOBALS.values(), ids=GLOBALS)
def test_a_global_key_counts_once_in_any_band(
    positions: list[int], dilation: int | list[int], causal: bool
) -> None:
    layout = Layout.from_lengths([LENGTH, 5], [positions, []])
    check(layout, RADIUS, torch.float32, causal=causal, dilation=dilation)


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


dilations = st.integers(1, 4) | st.lists(st.integers(1, 4), min_size=3, max_size=3)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    layout=layouts(),
    radius=st.integers(1, 45),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    dilation=dilations,
)
def test_any_batch_and_band(
    layout: Layout, radius: int, dtype: torch.dtype, causal: bool, dilation: int | list[int]
) -> None:
    if layout.num_tokens:
        check(layout, radius, dtype, shape=(3, 4), causal=causal, dilation=dilation)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_head_size(head_dim: int, dtype: torch.dtype) -> None:
    layout = Layout.from_lengths([40, 9], [[0, 20], []])
    check(layout, RADIUS, dtype, shape=(2, head_dim), causal=True, dilation=[1, 2])


@pytest.mark.parametrize("dilation", [1, [1, 2]], ids=str)
def test_a_batch_without_tokens_gives_none(dilation: int | list[int]) -> None:
    q, k, v = draw(0, torch.float32)
    layout = Layout.from_lengths([0, 0])

    out, lse = window_attention_with_lse(q, k, v, layout, 2, dilation=dilation)

    assert out.shape == (0, 2, 4)
    assert lse.shape == (0, 2)


def test_published_block_sizes() -> None:
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(plan, "_BLOCK", {"cpu": 128})
        patching.setattr(plan, "_WHOLE", 256)
        layout = Layout.from_lengths([700, 256, 257], [[0, 350], [255], []])
        check(layout, 100, torch.float32)
        check(layout, 60, torch.float32, causal=True, dilation=[1, 2])


@pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])
@pytest.mark.parametrize("dilation", [1, 2, [1, 3]], ids=str)
def test_a_document_does_not_depend_on_its_neighbours(
    dilation: int | list[int], causal: bool
) -> None:
    q, k, v = draw(100, torch.float32)
    layout = Layout.from_lengths([30, 50, 20], [[0], [0, 49], []])
    hurt = [x.clone() for x in (q, k, v)]
    for x in hurt:
        x[:30], x[80:] = torch.nan, torch.inf

    def attend(*inputs: Tensor) -> Tensor:
        return window_attention(*inputs, layout, RADIUS, causal=causal, dilation=dilation)

    assert torch.equal(attend(*hurt)[30:80], attend(q, k, v)[30:80])


def test_inputs_that_are_views() -> None:
    """As a fused projection hands them out."""
    layout = Layout.from_lengths([35, 25], [[0, 20], [24]])
    together = torch.stack(draw(60, torch.float64), 1)
    views = tuple(together.unbind(1))
    assert not views[0].is_contiguous()
    for ours, theirs in zip(
        run(tuple(x.contiguous() for x in views), layout, RADIUS, "blocked")[:4],
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

    def attend(*x: Tensor, dropout_p: float = 0.0, **band: Any) -> Tensor:
        torch.manual_seed(7)
        return window_attention(*x, layout, 2, dropout_p=dropout_p, **band)

    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, dropout_p=0.3), inputs)


@pytest.mark.parametrize("dilation", [1, 2, [3, 1]], ids=str)
def test_gradcheck_of_dropout_in_other_bands(dilation: int | list[int]) -> None:
    """Forward and backward draw the same."""
    layout = Layout.from_lengths([10, 4], [[0, 6], []])
    inputs = [x[..., :2].contiguous().requires_grad_() for x in draw(14, torch.float64)]

    def attend(*x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return window_attention(*x, layout, 2, dropout_p=0.3, causal=True, dilation=dilation)

    assert torch.autograd.gradcheck(attend, inputs)


def test_dropout_is_a_draw_of_its_own_and_leaves_the_lse_alone() -> None:
    """Cheaper than counters; heads of other dilations draw other numbers."""
    layout = Layout.from_lengths([LENGTH], [[0]])
    q, k, v = draw(LENGTH, torch.float32)
    dropped = []
    for implementation in ("blocked", "reference"):
        torch.manual_seed(3)
        given: Any = {"implementation": implementation, "dilation": [1, 2]}
        out, lse = window_attention_with_lse(q, k, v, layout, RADIUS, dropout_p=0.5, **given)
        exact = window_attention_with_lse(q, k, v, layout, RADIUS, **given)[1]
        torch.testing.assert_close(lse, exact)
        dropped.append(out)
    assert not torch.allclose(*dropped)


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


@pytest.mark.parametrize("dilation", [1, 3, [1, 2]], ids=str)
def test_nothing_of_the_size_of_the_window_is_kept(dilation: int | list[int]) -> None:
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    layout = Layout.from_lengths([400], [[0]])
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.requires_grad_() for x in draw(400, dtype))
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            window_attention(q, k, v, layout, 64, dilation=dilation)
        assert kept
        assert sum(kept) <= 5 * q.nbytes


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_under_autocast_are_those_of_inputs_in_its_dtype(p: float) -> None:
    """Even where the backward pass runs under it too."""
    layout = Layout.from_lengths([30, 9], [[0, 17], [3]])
    inputs = draw(39, torch.float32)
    cast = tuple(x.bfloat16() for x in inputs)
    results = []
    for each, is_on in ((inputs, True), (cast, False)):
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            results.append(run(each, layout, RADIUS, "blocked", dropout_p=p))
    mine, expected = results
    assert [x.dtype for x in mine[:4]] == [torch.bfloat16] + [torch.float32] * 3
    for ours, theirs in zip(mine, expected, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


def test_a_second_derivative_is_refused() -> None:
    inputs = [x.requires_grad_() for x in draw(9, torch.float32)]
    out = window_attention(*inputs, Layout.from_lengths([9]), RADIUS)
    (first,) = torch.autograd.grad(out.sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("needs_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_an_operator_as_torch_wants_one(dtype: torch.dtype, needs_lse: bool) -> None:
    """Its declared shapes, its gradient and its tracing are those of what it computes."""
    layout = Layout.from_lengths([30, 9], [[0, 17], [3]])
    inputs = [x.requires_grad_() for x in draw(39, dtype)]
    args = (*inputs, layout.number, RADIUS, [1, 2], True, 0.5, 0.0, 0, True, needs_lse)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.longhaul.blocked_attention, args, test_utils=tests)
