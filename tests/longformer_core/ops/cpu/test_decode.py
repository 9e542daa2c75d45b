"""The compiled kernels for a decoder's few rows, against torch in float64."""

import logging
import shutil
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from longformer_core.ops.cpu import decode
from longformer_core.ops.cpu import features as cpu
from longformer_core.ops.cpu.features import has_avx512, kernels
from longformer_core.ops.linear import Linear
from tests.helpers import num_threads
from tests.longformer_core.generation.helpers import decode as written_by
from tests.longformer_core.generation.helpers import documents, models, published

needs_kernels = pytest.mark.skipif(kernels() is None, reason="needs AVX-512 and compiled kernels")
DTYPES = [torch.float32, torch.bfloat16]
HEADS = 3


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def error(found: Tensor, exact: Tensor) -> float:
    """Return the largest error in units of the largest value."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def torch_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> Tensor:
    """Attend document by document, by torch."""
    return torch.cat(
        [
            scaled_dot_product_attention(
                q[i : i + 1].transpose(1, 2), keys[i : i + 1, :, :n], values[i : i + 1, :, :n]
            ).transpose(1, 2)
            for i, n in enumerate(lengths)
        ]
    )


def test_compiled_where_it_can_be() -> None:
    if has_avx512() and shutil.which("g++"):
        assert kernels() is not None


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
class TestMultiply:
    @pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 23, 64])
    @pytest.mark.parametrize(
        ("num_weights", "length"), [(1, 32), (3, 64), (70, 96), (129, 768), (64, 3072)]
    )
    def test_as_exact_as_torch(
        self, dtype: torch.dtype, rows: int, num_weights: int, length: int
    ) -> None:
        x, w = draw(rows, length, dtype=dtype), draw(num_weights, length, seed=1, dtype=dtype)
        for bias in (None, draw(num_weights, seed=2, dtype=dtype)):
            exact = linear(x.double(), w.double(), None if bias is None else bias.double())
            found = decode.multiply(x, w, bias)
            assert found.dtype == dtype
            assert error(found, exact) <= 1.5 * error(linear(x, w, bias), exact) + 1e-7

    def test_a_row_does_not_depend_on_its_neighbours(self, dtype: torch.dtype) -> None:
        x, w, bias = (draw(*s, dtype=dtype) for s in ((11, 160), (50, 160), (50,)))
        whole = decode.multiply(x, w, bias)
        for first, last in ((0, 1), (3, 6), (5, 11), (10, 11)):
            assert torch.equal(decode.multiply(x[first:last], w, bias), whole[first:last])

    def test_rows_and_bias_may_lie_apart(self, dtype: torch.dtype) -> None:
        x, w = draw(64, 5, dtype=dtype).T, draw(10, 64, dtype=dtype)
        bias = draw(20, dtype=dtype)[::2]
        expected = decode.multiply(x.contiguous(), w, bias.contiguous())
        assert torch.equal(decode.multiply(x, w, bias), expected)

    def test_rounds_as_torch_does(self, dtype: torch.dtype) -> None:
        """Sums of two numbers of every size, so halfway cases too, and what is not finite."""
        bits = torch.arange(0, 2**16, 7, dtype=torch.int32).to(torch.int16)
        x = bits.view(torch.bfloat16)[: 95 * 32].reshape(95, 32).to(dtype)
        bias = draw(32, dtype=dtype) * x[5:6].abs().nan_to_num(1.0)[0].clamp(1e-3, 1e3)
        for rows in x.split(5):
            for row in rows[rows.isfinite().all(1)]:
                found = decode.multiply(row[None], torch.eye(32, dtype=dtype), bias)[0]
                assert torch.equal(found, (row.float() + bias.float()).to(dtype))

    def test_what_is_not_finite_stays_so(self, dtype: torch.dtype) -> None:
        x, w = draw(4, 64, dtype=dtype), draw(8, 64, dtype=dtype)
        x[0, 5], x[1, 6] = torch.nan, torch.inf
        found = decode.multiply(x, w, None)
        assert found[0].isnan().all()
        assert found[1].isinf().all()
        assert found[2:].isfinite().all()

    def test_flops_are_counted(self, dtype: torch.dtype) -> None:
        with FlopCounterMode(display=False) as counter:
            decode.multiply(draw(4, 64, dtype=dtype), draw(8, 64, dtype=dtype), None)
        assert counter.get_total_flops() == 2 * 4 * 64 * 8


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
class TestAttend:
    @pytest.mark.parametrize("rows", [1, 3, 4, 5, 16])
    @pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
    @pytest.mark.parametrize("lengths", [[1], [3, 127, 128, 129], [500, 40], [9000]])
    def test_as_exact_as_torch(
        self, dtype: torch.dtype, rows: int, head_dim: int, lengths: list[int]
    ) -> None:
        size = (len(lengths), HEADS, max(lengths), head_dim)
        # Large queries: a few keys have nearly all of the weight.
        q = draw(len(lengths), rows, HEADS, head_dim, dtype=dtype) * 3
        keys, values = draw(*size, seed=1, dtype=dtype), draw(*size, seed=2, dtype=dtype)
        for i, length in enumerate(lengths):
            # Padding is not read.
            keys[i, :, length:] = values[i, :, length:] = torch.nan
        exact = torch_attention(q.double(), keys.double(), values.double(), lengths)
        found = decode.attend(q, keys, values, lengths)
        assert found.dtype == dtype
        theirs = error(torch_attention(q, keys, values, lengths), exact)
        assert error(found, exact) <= 1.5 * theirs + 5e-7

    def test_a_document_without_tokens_gives_zeros(self, dtype: torch.dtype) -> None:
        q, keys = draw(2, 4, HEADS, 64, dtype=dtype), draw(2, HEADS, 5, 64, dtype=dtype)
        found = decode.attend(q, keys, keys, [0, 5])
        assert not found[0].any()
        assert found[1].any()

    def test_rows_and_documents_do_not_depend_on_others(self, dtype: torch.dtype) -> None:
        lengths = [5000, 300]
        q, keys = draw(2, 6, HEADS, 64, dtype=dtype), draw(2, HEADS, 5000, 64, dtype=dtype)
        whole = decode.attend(q, keys, keys.flip(2), lengths)
        alone = decode.attend(q[1:, 2:3], keys[1:], keys.flip(2)[1:], lengths[1:])
        assert torch.equal(alone, whole[1:, 2:3])

    def test_a_part_of_a_larger_tensor(self, dtype: torch.dtype) -> None:
        q, keys = draw(2, 4, HEADS, 64, dtype=dtype), draw(5, HEADS, 90, 64, dtype=dtype)
        part, values = keys[:2, :, :70], keys.flip(3).contiguous()[:2, :, :70]
        assert decode.can_attend(q, part, values)
        expected = decode.attend(q, part.contiguous(), values.contiguous(), [70, 33])
        assert torch.equal(decode.attend(q, part, values, [70, 33]), expected)

    def test_nan_is_not_hidden(self, dtype: torch.dtype) -> None:
        q, keys = draw(1, 4, HEADS, 64, dtype=dtype), draw(1, HEADS, 300, 64, dtype=dtype)
        q[0, 1] = torch.nan
        found = decode.attend(q, keys, keys, [300])
        assert found[0, 1].isnan().all()
        assert found[0, [0, 2, 3]].isfinite().all()

    def test_flops_are_counted(self, dtype: torch.dtype) -> None:
        q, keys = draw(2, 4, HEADS, 64, dtype=dtype), draw(2, HEADS, 300, 64, dtype=dtype)
        with FlopCounterMode(display=False) as counter:
            decode.attend(q, keys, keys, [300, 7])
        assert counter.get_total_flops() == 2 * 2 * 4 * HEADS * 64 * 307


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    x, w = draw(7, 160, dtype=dtype), draw(500, 160, dtype=dtype)
    q, keys = draw(2, 4, HEADS, 64, dtype=dtype), draw(2, HEADS, 9000, 64, dtype=dtype)
    results = []
    for threads in (1, 2, 5):
        with num_threads(threads):
            results.append((decode.multiply(x, w, None), decode.attend(q, keys, keys, [9000, 77])))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


class TestWhere:
    X, W = draw(4, 64), draw(8, 64)

    @needs_kernels
    def test_decode_and_no_others(self) -> None:
        assert decode.can_multiply(self.X, self.W, None)
        assert not decode.can_multiply(draw(500, 64), self.W, None)
        assert not decode.can_multiply(self.X[:0], self.W, None)
        assert not decode.can_attend(draw(1, 17, 2, 64), *[draw(1, 2, 9, 64)] * 2)

    @needs_kernels
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("is_slow", "most"), [(False, 16), (True, 192)])
    def test_more_of_them_where_torch_is_slow(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_slow: bool, most: int
    ) -> None:
        if dtype == torch.bfloat16:
            most = 64 if is_slow else 8
        for name in ("multiplies_float32_slowly", "multiplies_bfloat16_slowly"):
            monkeypatch.setattr(decode, name, lambda: is_slow)
        taken = [
            decode.can_multiply(draw(rows, 64, dtype=dtype), self.W.to(dtype), None)
            for rows in (most, most + 1)
        ]
        assert taken == [True, False]

    @needs_kernels
    def test_not_what_it_cannot_read(self) -> None:
        assert not decode.can_multiply(self.X.double(), self.W.double(), None)
        assert not decode.can_multiply(self.X, self.W.bfloat16(), None)
        assert not decode.can_multiply(self.X.to("meta"), self.W.to("meta"), None)
        assert not decode.can_multiply(draw(4, 40), draw(8, 40), None)
        assert not decode.can_multiply(self.X, draw(64, 8).T, None)
        assert not decode.can_multiply(self.X[None], self.W, None)
        q, keys = draw(1, 4, 2, 64), draw(1, 9, 2, 64).transpose(1, 2)
        assert not decode.can_attend(q, keys, keys)
        assert not decode.can_attend(q[..., :16], *[draw(1, 2, 9, 16)] * 2)

    @needs_kernels
    def test_what_does_not_fit_together_is_left_to_torch_to_refuse(self) -> None:
        assert not decode.can_multiply(self.X, draw(8, 96), None)
        assert not decode.can_multiply(self.X, self.W, draw(8).double())
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            Linear(96, 8)(self.X)
        q, keys = draw(2, 4, 2, 64), draw(2, 2, 9, 64)
        assert decode.can_attend(q, keys, keys)
        for other in (keys[:1], keys[:, :1], keys[:, :, :8], draw(2, 2, 9, 32)):
            assert not decode.can_attend(q, other, keys)
            assert not decode.can_attend(q, keys, other)
            assert other.shape[2] == 8 or not decode.can_attend(q, other, other)

    @needs_kernels
    def test_a_gradient_is_refused_and_not_taken_for_zero(self) -> None:
        with torch.enable_grad(), pytest.raises(NotImplementedError, match="for inference"):
            decode.multiply(self.X.clone().requires_grad_(), self.W, None).sum().backward()

    @needs_kernels
    def test_not_under_autocast_or_with_gradients(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not decode.can_multiply(self.X, self.W, None)
        with torch.enable_grad():
            assert not decode.can_multiply(self.X, self.W, None)

    def test_the_log_tells_why_not(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(cpu, "has_avx512", lambda: False)
        with caplog.at_level(logging.INFO, cpu.__name__):
            assert cpu.kernels.__wrapped__() is None
        assert "it has no AVX-512" in caplog.text
        monkeypatch.setattr(cpu, "has_avx512", lambda: True)
        monkeypatch.setitem(sys.modules, "longformer_core.ops.cpu._kernels", None)
        with caplog.at_level(logging.INFO, cpu.__name__):
            assert cpu.kernels.__wrapped__() is None
        assert "not compiled when the package was installed" in caplog.text


@needs_kernels
@pytest.mark.parametrize("num_beams", [1, 3, 4])
def test_a_model_writes_what_transformers_writes(
    num_beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Heads are wide enough for the kernels, which they are not in other tests' models.
    ours, theirs = models(3, d_model=128)
    texts = documents(3, 40, 7, 61, 25)
    options = {"num_beams": num_beams, "max_new_tokens": 30, "min_new_tokens": 12}
    expected, _ = published(theirs, texts, options)
    other, _ = published(theirs, documents(4, 40, 7, 61, 25), options)
    assert all(one != two for one, two in zip(expected, other, strict=True)), "sees no source"

    used: list[str] = []
    for function in ("multiply", "attend"):
        own = getattr(decode, function)
        monkeypatch.setattr(
            decode, function, lambda *args, own=own: used.append(own.__name__) or own(*args)
        )

    def texts_found() -> list[list[list[int]]]:
        return [outcome.sequences for outcome in written_by(ours, texts, options)]

    assert texts_found() == expected
    assert set(used) == {"multiply", "attend"}
    used.clear()
    monkeypatch.setattr(decode, "kernels", lambda: None)
    assert texts_found() == expected
    assert not used
