"""The compiled kernel of blocked attention's forward pass, against the dense definition in float64.

Training does not use it, so there are no gradients to compare.
"""

from collections.abc import Iterator
from typing import Any

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
from tests.longformer_core.attention.blocked.test_attention import GLOBALS, LENGTH, draw

pytestmark = pytest.mark.skipif(kernels() is None, reason="needs AVX-512 and compiled kernels")
DTYPES = [torch.float32, torch.bfloat16]
causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def call_of(layout: Layout, radius: int, causal: bool = False) -> Call:
    return calls_of(layout.number, radius, [1, 1], causal, 0.25, 0.0, 0)[0]


def check(
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
    lse = torch.empty(*inputs[0].shape[:2], 1)
    call = calls_of(layout.number, radius, [1] * shape[0], causal, shape[1] ** -0.5, 0.0, 0)[0]
    assert native.can_attend(call, inputs[0])
    ours = native.attend(call, *inputs, lse), lse[..., 0]
    assert (ours[0].dtype, ours[1].dtype) == (dtype, torch.float32)
    for exact, other, found in zip(oracle, plain, ours, strict=True):
        limit = 2 * (other.double() - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (found.double() - exact).abs().max() <= limit
    assert torch.equal(native.attend(call, *inputs, None), ours[0])


def attend(inputs: tuple[Tensor, ...], layout: Layout, radius: int, causal: bool = False) -> Tensor:
    call = call_of(layout, radius, causal)
    assert native.can_attend(call, inputs[0])
    return native.attend(call, *inputs, None)


@causal_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", GLOBALS.values(), ids=GLOBALS)
@pytest.mark.parametrize("radius", [1, 4])
def test_a_global_key_counts_once_wherever_it_lies(
    positions: list[int], radius: int, dtype: torch.dtype, causal: bool
) -> None:
    layout = Layout.from_lengths([LENGTH, 5], [positions, []])
    check(layout, radius, dtype, shape=(2, 16), causal=causal)


@causal_or_not
@pytest.mark.parametrize("radius", [1, 11, 12, 64, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents_of_any_length_share_a_batch(
    radius: int, dtype: torch.dtype, causal: bool
) -> None:
    lengths = [0, 1, 5, 6, 7, 12, 13, 0, 15, 16, 17, 63, 64, 65, 200]
    layout = Layout.from_lengths(lengths, [[0][:n] for n in lengths])
    check(layout, radius, dtype, shape=(2, 32), causal=causal)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 112, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    layout = Layout.from_lengths([150, 9], [[0, 20, 149], []])
    check(layout, 30, dtype, shape=(2, head_dim))


def test_more_queries_than_a_task_has_and_more_globals_than_a_panel() -> None:
    layout = Layout.from_lengths([2100, 300], [list(range(0, 2100, 23)), list(range(70))])
    check(layout, 17, torch.float32, shape=(1, 16))


@st.composite
def layouts(data: st.DrawFn) -> Layout:
    lengths = data(st.lists(st.integers(0, 90), min_size=1, max_size=4))
    positions = [
        data(st.lists(st.integers(0, n - 1), max_size=n, unique=True)) if n else [] for n in lengths
    ]
    return Layout.from_lengths(lengths, positions)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    layout=layouts(),
    radius=st.integers(1, 95),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    head_dim=st.sampled_from([16, 32, 80]),
)
def test_any_batch_and_band(
    layout: Layout, radius: int, dtype: torch.dtype, causal: bool, head_dim: int
) -> None:
    if layout.num_tokens:
        check(layout, radius, dtype, shape=(3, head_dim), causal=causal)


@causal_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_document_does_not_depend_on_its_neighbours(dtype: torch.dtype, causal: bool) -> None:
    inputs = draw(130, dtype, shape=(2, 32))
    whole = attend(inputs, Layout.from_lengths([30, 77, 23], [[0], [0, 49], []]), 20, causal)
    alone = tuple(x[30:107] for x in inputs)
    hurt = [x.clone() for x in inputs]
    for x in hurt:
        x[:30], x[107:] = torch.nan, torch.inf
    hurt_whole = attend(
        tuple(hurt), Layout.from_lengths([30, 77, 23], [[0], [0, 49], []]), 20, causal
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        by_itself = attend(alone, Layout.from_lengths([77], [[0, 49]]), 20, causal)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[30:107], by_itself)
    assert torch.equal(hurt_whole[30:107], by_itself)


def test_scores_of_any_size() -> None:
    q, k, v = draw(50, torch.float32, shape=(2, 16))
    layout = Layout.from_lengths([50], [[0]])
    for factor in (1e-30, 1e3, 1e15):
        inputs = (q * factor, k * factor, v)
        exact = tuple(x.double() for x in inputs)
        found = attend(inputs, layout, 10)
        expected = window_attention(*exact, layout, 10, scale=0.25, implementation="reference")
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_number_stays_none() -> None:
    q, k, v = draw(50, torch.float32, shape=(2, 16))
    q[20, 0, 3] = torch.nan
    out = attend((q, k, v), Layout.from_lengths([50], [[0]]), 10)
    assert out[20, 0].isnan().all()
    assert out.isnan().sum() == 16


def test_inputs_that_are_views() -> None:
    layout = Layout.from_lengths([35, 25], [[0, 20], [24]])
    inputs = draw(60, torch.float32, shape=(2, 16))
    views = torch.stack(inputs, 1).unbind(1)
    assert not views[0].is_contiguous()
    assert torch.equal(attend(tuple(views), layout, 4), attend(inputs, layout, 4))


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
