import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import dynamic as quantized_dynamic
from torch.ao.quantization import quantize_dynamic
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from longformer_core.attention.blocked import attention
from longformer_core.layout import Layout
from longformer_core.models.self_attention import LongformerSelfAttention
from longformer_core.ops import linear as subject
from longformer_core.ops.cpu import gemm
from longformer_core.ops.linear import Linear, is_plain_linear, widest_dtype
from tests.helpers import without_kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MANY, WIDTH = 200, 64
INTEL = {"architecture": "x86_64", "cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}


class Products(TorchDispatchMode):
    """Notes the dtypes in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if any(name in str(func) for name in ("mm", "scaled_dot_product", "linear")):
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, Tensor)}
        return func(*args, **(kwargs or {}))


def multiplied_in(module: nn.Module, states: Tensor) -> set[torch.dtype]:
    with Products() as products:
        assert module(states).dtype == states.dtype
    return products.dtypes


def by_torch(module: nn.Linear, states: Tensor) -> Tensor:
    return functional.linear(states, module.weight, module.bias)


def draw(rows: int = MANY, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, WIDTH, generator=generator).to(dtype)


@pytest.fixture
def module() -> Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Linear(WIDTH, WIDTH).to(torch.bfloat16)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that torch's products are slow on, those of bfloat16 most of all."""
    monkeypatch.setattr(subject, "multiplies_bfloat16_slowly", lambda: True)
    monkeypatch.setattr(subject, "multiplies_float32_slowly", lambda: True)
    monkeypatch.setattr(attention, "multiplies_bfloat16_slowly", lambda: True)


@pytest.fixture(params=["kernel", "torch"])
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Multiply many rows with and without a kernel; return what is multiplied in, as torch sees."""
    if request.param == "torch":
        without_kernels(monkeypatch)
    has_kernel = gemm.kernels() is not None
    # A kernel widens what it is given inside.
    return {torch.bfloat16 if has_kernel else torch.float32}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class TestByCpu:
    @pytest.mark.parametrize(
        ("differences", "is_slow"),
        [
            ({}, True),
            ({"avx512_bf16": False}, True),
            ({"amx_bf16": True}, False),
            ({"cpu_name": "AMD EPYC"}, False),
            ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, True),
            ({"architecture": "aarch64"}, False),
        ],
    )
    def test_by_cpu(
        self, monkeypatch: pytest.MonkeyPatch, differences: dict[str, object], is_slow: bool
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: INTEL | differences)
        assert subject.multiplies_bfloat16_slowly.__wrapped__() == is_slow

    @pytest.mark.parametrize(
        ("differences", "is_slow"),
        [
            ({}, False),
            ({"cpu_name": "AMD EPYC"}, True),
            ({"cpu_name": "AMD EPYC", "avx512_f": False}, False),
        ],
    )
    def test_float32_by_cpu(
        self, monkeypatch: pytest.MonkeyPatch, differences: dict[str, object], is_slow: bool
    ) -> None:
        has = INTEL | dict.fromkeys(("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"), True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has | differences)
        assert subject.multiplies_float32_slowly.__wrapped__() == is_slow

    def test_this_cpu_has_an_answer(self) -> None:
        assert subject.multiplies_bfloat16_slowly() in (True, False)
        assert subject.multiplies_float32_slowly() in (True, False)

    @pytest.mark.usefixtures("slow")
    def test_only_bfloat16_on_cpus_is_widened(self, many: set[torch.dtype]) -> None:
        assert {widest_dtype(torch.bfloat16, CPU)} == many
        assert widest_dtype(torch.bfloat16, GPU) == torch.bfloat16
        for dtype in (torch.float16, torch.float32, torch.float64):
            assert widest_dtype(dtype, CPU) == dtype


class TestLinear:
    @pytest.mark.usefixtures("slow")
    @pytest.mark.parametrize("rows", [MANY, 3000])
    @pytest.mark.parametrize("bias", [True, False])
    def test_the_product_is_rounded_once(
        self, module: Linear, rows: int, bias: bool, many: set[torch.dtype]
    ) -> None:
        if not bias:
            module.bias = None
        states = draw(rows)

        out = module(states)

        exact = states.double() @ module.weight.double().T
        if module.bias is not None:
            exact += module.bias.double()
        # Of numbers in the middle between two of bfloat16 the sum in float32 may choose the other.
        assert (out == exact.to(torch.bfloat16)).float().mean() > 0.999
        torch.testing.assert_close(out, by_torch(module, states))

    @pytest.mark.usefixtures("slow")
    def test_rows_of_gemm_are_multiplied_in_float32(
        self, module: Linear, many: set[torch.dtype]
    ) -> None:
        assert multiplied_in(module, draw()) == many

    def test_a_fast_cpu_multiplies_as_asked(
        self, monkeypatch: pytest.MonkeyPatch, module: Linear
    ) -> None:
        monkeypatch.setattr(subject, "multiplies_bfloat16_slowly", lambda: False)
        assert multiplied_in(module, draw()) == {torch.bfloat16}

    @pytest.mark.usefixtures("slow")
    def test_few_rows_stay_in_16_bits(self, module: Linear) -> None:
        assert multiplied_in(module, draw(4)) == {torch.bfloat16}
        assert module(draw(0)).shape == (0, WIDTH)

    @pytest.mark.usefixtures("slow")
    def test_what_is_more_than_a_product_is_left_alone(self, module: Linear) -> None:
        nn.utils.parametrizations.weight_norm(module)
        assert multiplied_in(module, draw()) == {torch.bfloat16}

    @pytest.mark.usefixtures("slow")
    def test_hooks_see_what_torch_would_show_them(self, module: Linear) -> None:
        seen = []
        module.register_forward_hook(lambda _, given, out: seen.extend([given[0].dtype, out.dtype]))
        module(draw())
        assert seen == [torch.bfloat16] * 2

    @pytest.mark.usefixtures("slow")
    def test_a_projection_to_a_vocabulary_is_not_widened(self, module: Linear) -> None:
        module.by_gemm = False
        assert multiplied_in(module, draw()) == {torch.bfloat16}

    @pytest.mark.usefixtures("slow")
    def test_gradients_are_left_alone(self, module: Linear) -> None:
        with torch.enable_grad():
            assert multiplied_in(module, draw()) == {torch.bfloat16}
            module(draw()).float().sum().backward()
        assert module.weight.grad is not None
        assert module.weight.grad.dtype == torch.bfloat16

    @pytest.mark.usefixtures("slow")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_autocast_decides_for_itself(self, dtype: torch.dtype) -> None:
        module, states = Linear(WIDTH, WIDTH), draw(dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(module(states), by_torch(module, states))


@pytest.mark.parametrize("kind", [Linear, nn.Linear])
def test_a_hooked_projection_is_not_plain(kind: type[nn.Linear]) -> None:
    module = kind(2, 2)
    assert is_plain_linear(module)
    handle = module.register_forward_hook(lambda *_: None)
    assert not is_plain_linear(module)
    handle.remove()
    assert is_plain_linear(module)
    nn.utils.parametrizations.weight_norm(module)
    assert not is_plain_linear(module)


def test_other_kinds_are_not_plain() -> None:
    class Wrapped(Linear):
        pass

    assert not is_plain_linear(Wrapped(2, 2))
    assert not is_plain_linear(nn.Sequential(Linear(2, 2)))
    assert Wrapped not in (Linear, nn.Linear)


def test_it_survives_copies_and_files(module: Linear) -> None:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert type(other) is Linear
        assert torch.equal(other(draw()), module(draw()))
    assert module.state_dict().keys() == nn.Linear(2, 2).state_dict().keys()


# The quantizers of torch.ao look modules up by their exact type.
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.ao")
def test_quantizers_find_it() -> None:
    module = LongformerSelfAttention(WIDTH, 2, 16, 0.0).eval()
    quantized = quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    assert {type(m) for m in quantized.children()} == {quantized_dynamic.Linear}
    assert not is_plain_linear(quantized.key_global)
    layout, states = Layout.from_lengths([MANY], [[0]]), draw(dtype=torch.float32)
    found, expected = quantized(states, layout), module(states, layout)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


@pytest.mark.usefixtures("slow")
def test_window_attention_too_is_multiplied_in_float32(many: set[torch.dtype]) -> None:
    module = LongformerSelfAttention(WIDTH, 2, 16, 0.0).to(torch.bfloat16).eval()
    layout = Layout.from_lengths([MANY], [[]])
    with Products() as products:
        out = module(draw(), layout)
    assert out.dtype == torch.bfloat16
    assert products.dtypes == many
