"""The compiled kernel for many rows, against products in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from longformer_core.ops import linear as caller
from longformer_core.ops.cpu import gemm
from longformer_core.ops.cpu.features import kernels
from tests.helpers import num_threads

pytestmark = pytest.mark.skipif(kernels() is None, reason="needs AVX-512 and compiled kernels")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


ROWS = pytest.mark.parametrize("rows", [1, 5, 6, 95, 96, 97, 200])
SHAPES = pytest.mark.parametrize(
    ("num_weights", "length"),
    [(16, 16), (48, 128), (64, 144), (80, 112), (400, 768), (784, 272), (32, 3072)],
)


@ROWS
@SHAPES
def test_float32_is_rounded_as_sums_are(rows: int, num_weights: int, length: int) -> None:
    x, w = (draw(n, length, seed=n, dtype=torch.float32) for n in (rows, num_weights))
    for bias in (None, draw(num_weights, dtype=torch.float32)):
        exact = linear(x.double(), w.double(), None if bias is None else bias.double())
        found = gemm.multiply(x, w, bias)
        assert found.dtype == torch.float32
        # Roundings of sums of so many terms seldom add up to more than their root.
        spacings = 2**-24 * (2 + length**0.5) * (1 + linear(x.abs(), w.abs()))
        assert ((found - exact).abs() <= spacings).all()


@ROWS
@SHAPES
def test_sums_are_rounded_once(rows: int, num_weights: int, length: int) -> None:
    x, w = draw(rows, length), draw(num_weights, length, seed=1)
    for bias in (None, draw(num_weights, seed=2)):
        exact = linear(x.double(), w.double(), None if bias is None else bias.double())
        found = gemm.multiply(x, w, bias)
        assert found.dtype == torch.bfloat16
        # Of numbers in the middle between two of bfloat16 the sum in float32 may choose the other.
        assert (found != exact.bfloat16()).sum() <= 2 + found.numel() / 500
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours_or_the_threads() -> None:
    x, w, bias = draw(210, 160), draw(400, 160), draw(400)
    with num_threads(2):
        whole = gemm.multiply(x, w, bias)
    with num_threads(1):
        for first, last in ((0, 1), (3, 6), (95, 200), (209, 210)):
            assert torch.equal(gemm.multiply(x[first:last], w, bias), whole[first:last])


def test_rows_and_bias_may_lie_apart() -> None:
    x, w, bias = draw(64, 100).T, draw(32, 64), draw(64)[::2]
    expected = gemm.multiply(x.contiguous(), w, bias.contiguous())
    assert torch.equal(gemm.multiply(x, w, bias), expected)


def test_what_is_not_finite_stays_so_and_where_it_is() -> None:
    x, w = draw(100, 64), draw(32, 64)
    x[0, 5], x[1, 6] = torch.nan, torch.inf
    found = gemm.multiply(x, w, None)
    assert found[0].isnan().all()
    assert found[1].isinf().all()
    assert found[2:].isfinite().all()


def test_flops_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        gemm.multiply(draw(100, 64), draw(32, 64), None)
    assert counter.get_total_flops() == 2 * 100 * 64 * 32


def test_a_gradient_is_refused_and_not_taken_for_zero() -> None:
    x = draw(100, 64)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="for inference"):
        gemm.multiply(x.requires_grad_(), draw(32, 64), None).sum().backward()


def test_what_it_does_not_take_is_left_to_torch() -> None:
    x, w, bias = draw(100, 64), draw(32, 64), draw(32)
    assert gemm.can_multiply(x, w, bias)
    assert gemm.can_multiply(x, w, None)
    assert gemm.can_multiply(x.float(), w.float(), bias.float())
    for others in (
        (x.half(), w.half(), bias.half()),
        (x, w.float(), bias),
        (x, w, bias.float()),
        (x, w, draw(31)),
        (x, draw(33, 64), None),
        (x, draw(32, 80), None),
        (draw(100, 72), draw(32, 72), None),
        (x, draw(64, 32).T, None),
        (draw(2, 50, 64), w, None),
    ):
        assert not gemm.can_multiply(*others)
    with torch.enable_grad():
        assert not gemm.can_multiply(x, w, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not gemm.can_multiply(x, w, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_multiplies_where_torch_is_slow(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    own, used = gemm.multiply, []
    monkeypatch.setattr(gemm, "multiply", lambda *args: used.append(1) or own(*args))
    module, x = caller.Linear(64, 32).to(dtype), draw(200, 64, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    for is_slow, times in ((False, 0), (True, 1)):
        monkeypatch.setattr(caller, f"multiplies_{name}_slowly", lambda is_slow=is_slow: is_slow)
        torch.testing.assert_close(module(x), linear(x, module.weight, module.bias))
        assert len(used) == times
