"""Blocked attention's forward pass by the compiled kernel, against the dense definition in float64.

Where the kernel cannot run, torch does its work, and so it does here in the same tests, everywhere.
Training does not use the kernel, so there are no gradients to compare.
"""

from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longformer_core.attention import window_attention, window_attention_with_lse
from longformer_core.attention.blocked import native
from longformer_core.attention.blocked.plan import Call, calls_of
from longformer_core.layout import Layout
from longformer_core.ops import linear
from longformer_core.ops.cpu.features import kernels
from tests.helpers import num_threads
from tests.longformer_core.attention.blocked.test_attention import GLOBALS, LENGTH, draw

needs_kernels = pytest.mark.skipif(kernels() is None, reason="needs AVX-512 and compiled kernels")
by_either = pytest.mark.parametrize("by", [pytest.param("native", marks=needs_kernels), "torch"])
DTYPES = [torch.float32, torch.bfloat16]
causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def call_of(
    layout: Layout, radius: int, causal: bool = False, shape: Sequence[int] = (2, 16)
) -> Call:
    num_heads, head_dim = shape
    return calls_of(layout.number, radius, [1] * num_heads, causal, head_dim**-0.5, 0.0, 0)[0]


def check(
    by: str,
    layout: Layout,
    radius: int,
    dtype: torch.dtype,
    shape: tuple[int, int],
    causal: bool = False,
) -> None:
    """Hold the rule: error at most twice that of the plain way in the same dtype."""
    inputs = draw(layout.num_tokens, dtype, shape=shape)
    band: Any = {"causal": causal, "implementation": "reference"}
    oracle = window_attention_with_lse(*(x.double() for x in inputs), layout, radius, **band)
    plain = window_attention_with_lse(*inputs, layout, radius, **band)
    ours = attend_with_lse(by, inputs, layout, radius, causal)
    assert (ours[0].dtype, ours[1].dtype) == (dtype, torch.float32)
    for exact, other, found in zip(oracle, plain, ours, strict=True):
        limit = 2 * (other.double() - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (found.double() - exact).abs().max() <= limit
    assert torch.equal(attend(by, inputs, layout, radius, causal), ours[0])


def attend_with_lse(
    by: str, inputs: tuple[Tensor, ...], layout: Layout, radius: int, causal: bool
) -> tuple[Tensor, Tensor]:
    if by == "torch":
        with patch.object(native, "can_attend", return_value=False):
            given: Any = {"causal": causal, "implementation": "blocked"}
            return window_attention_with_lse(*inputs, layout, radius, **given)
    call = call_of(layout, radius, causal, inputs[0].shape[1:])
    assert native.can_attend(call, inputs[0])
    lse = torch.empty(*inputs[0].shape[:2], 1)
    return native.attend(call, *inputs, lse), lse[..., 0]


def attend(
    by: str, inputs: tuple[Tensor, ...], layout: Layout, radius: int, causal: bool = False
) -> Tensor:
    """Compute without the lse, which is another branch of both."""
    if by == "torch":
        with patch.object(native, "can_attend", return_value=False):
            given: Any = {"causal": causal, "implementation": "blocked"}
            return window_attention(*inputs, layout, radius, **given)
    call = call_of(layout, radius, causal, inputs[0].shape[1:])
    assert native.can_attend(call, inputs[0])
    return native.attend(call, *inputs, None)


@by_either
@causal_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", GLOBALS.values(), ids=GLOBALS)
@pytest.mark.parametrize("radius", [1, 4])
def test_a_global_key_counts_once_wherever_it_lies(
    by: str, positions: list[int], radius: int, dtype: torch.dtype, causal: bool
) -> None:
    layout = Layout.from_lengths([LENGTH, 5], [positions, []])
    check(by, layout, radius, dtype, shape=(2, 16), causal=causal)


@by_either
@causal_or_not
@pytest.mark.parametrize("radius", [1, 11, 12, 64, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents_of_any_length_share_a_batch(
    by: str, radius: int, dtype: torch.dtype, causal: bool
) -> None:
    lengths = [0, 1, 5, 6, 7, 12, 13, 0, 15, 16, 17, 63, 64, 65, 200]
    layout = Layout.from_lengths(lengths, [[0][:n] for n in lengths])
    check(by, layout, radius, dtype, shape=(2, 32), causal=causal)


@by_either
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 112, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(by: str, head_dim: int, dtype: torch.dtype) -> None:
    layout = Layout.from_lengths([150, 9], [[0, 20, 149], []])
    check(by, layout, 30, dtype, shape=(2, head_dim))


@by_either
def test_more_queries_than_a_task_has_and_more_globals_than_a_panel(by: str) -> None:
    layout = Layout.from_lengths([2100, 300], [list(range(0, 2100, 23)), list(range(70))])
    check(by, layout, 17, torch.float32, shape=(1, 16))


@st.composite
def layouts(data: st.DrawFn) -> Layout:
    lengths = data(st.lists(st.integers(0, 90), min_size=1, max_size=4))
    positions = [
        data(st.lists(st.integers(0, n - 1), max_size=n, unique=True)) if n else [] for n in lengths
    ]
    return Layout.from_lengths(lengths, positions)


@by_either
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    layout=layouts(),
    radius=st.integers(1, 95),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    head_dim=st.sampled_from([16, 32, 80]),
)
def test_any_batch_and_band(
    by: str, layout: Layout, radius: int, dtype: torch.dtype, causal: bool, head_dim: int
) -> None:
    if layout.num_tokens:
        check(by, layout, radius, dtype, shape=(3, head_dim), causal=causal)


@needs_kernels
@causal_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_document_does_not_depend_on_its_neighbours(dtype: torch.dtype, causal: bool) -> None:
    inputs = draw(130, dtype, shape=(2, 32))
    layout = Layout.from_lengths([30, 77, 23], [[0], [0, 49], []])
    alone = tuple(x[30:107] for x in inputs)
    hurt = [x.clone() for x in inputs]
    for x in hurt:
        x[:30], x[107:] = torch.nan, torch.inf
    with num_threads(2):
        whole = attend("native", inputs, layout, 20, causal)
        hurt_whole = attend("native", tuple(hurt), layout, 20, causal)
    with num_threads(1):
        by_itself = attend("native", alone, Layout.from_lengths([77], [[0, 49]]), 20, causal)
    assert torch.equal(whole[30:107], by_itself)
    assert torch.equal(hurt_whole[30:107], by_itself)


@by_either
def test_scores_of_any_size(by: str) -> None:
    q, k, v = draw(50, torch.float32, shape=(2, 16))
    layout = Layout.from_lengths([50], [[0]])
    for factor in (1e-30, 1e3, 1e15):
        inputs = (q * factor, k * factor, v)
        exact = tuple(x.double() for x in inputs)
        found = attend(by, inputs, layout, 10)
        expected = window_attention(*exact, layout, 10, scale=0.25, implementation="reference")
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@by_either
def test_what_is_no_number_stays_none(by: str) -> None:
    q, k, v = draw(50, torch.float32, shape=(2, 16))
    q[20, 0, 3] = torch.nan
    out = attend(by, (q, k, v), Layout.from_lengths([50], [[0]]), 10)
    assert out[20, 0].isnan().all()
    assert out.isnan().sum() == 16


@by_either
def test_inputs_that_are_views(by: str) -> None:
    layout = Layout.from_lengths([35, 25], [[0, 20], [24]])
    inputs = draw(60, torch.float32, shape=(2, 16))
    views = torch.stack(inputs, 1).unbind(1)
    assert not views[0].is_contiguous()
    assert torch.equal(attend(by, tuple(views), layout, 4), attend(by, inputs, layout, 4))


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "is_slow"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
def test_it_is_what_computes_windows_unless_a_gradient_is_wanted(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_slow: bool
) -> None:
    monkeypatch.setattr(linear, "multiplies_bfloat16_slowly", lambda: is_slow)
    monkeypatch.setattr(native, "has_amx", lambda: False)
    inputs, layout = draw(60, dtype, shape=(2, 16)), Layout.from_lengths([60], [[0]])
    own, used = native.attend, []
    monkeypatch.setattr(native, "attend", lambda *args: used.append(1) or own(*args))
    out = window_attention(*inputs, layout, 9)
    assert used
    used.clear()
    inputs[2].requires_grad_()
    trained = window_attention(*inputs, layout, 9)
    assert not used
    # In 16 bits training may round its probabilities too.
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.016, "atol": 4e-3}
    torch.testing.assert_close(out, trained.detach(), **tolerance)
    with torch.no_grad():
        assert torch.equal(window_attention(*inputs, layout, 9), out)


@needs_kernels
def test_what_it_does_not_take_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Layout.from_lengths([20], [[0]])
    holes = Layout.from_lengths([20], [[0]], torch.arange(20) != 3)
    dilated = calls_of(plain.number, 3, [2, 2], False, 0.25, 0.0, 0)[0]
    dropped = calls_of(plain.number, 3, [1, 1], False, 0.25, 0.1, 0)[0]
    fitting = torch.zeros(20, 2, 16)
    assert native.can_attend(call_of(plain, 3), fitting)
    for call in (call_of(holes, 3), dilated, dropped):
        assert not native.can_attend(call, fitting)
    for x in (fitting.double(), fitting.half(), torch.zeros(20, 2, 24), torch.zeros(20, 2, 144)):
        assert not native.can_attend(call_of(plain, 3), x)
    monkeypatch.setattr(native, "has_amx", lambda: True)
    assert native.can_attend(call_of(plain, 3), fitting)
    assert not native.can_attend(call_of(plain, 3), fitting.bfloat16())
