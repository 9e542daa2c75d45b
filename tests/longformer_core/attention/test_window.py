import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from longformer_core.attention import dispatch, window_attention, window_attention_with_lse
from longformer_core.errors import ConfigError, ShapeError, log_once
from longformer_core.layout import Layout
from tests.helpers import run_example

ON_CPU = ("auto", "blocked", "reference")


def draw(num_tokens: int, head_dim: int = 4) -> Tensor:
    return torch.randn(3, num_tokens, 2, head_dim, generator=torch.Generator().manual_seed(0))


def test_the_example_runs() -> None:
    run_example(window_attention)


def test_scale_defaults_to_the_root_of_the_head_dimension() -> None:
    q, k, v = draw(6)
    layout = Layout.from_lengths([6])

    default = window_attention(q, k, v, layout, 2)

    torch.testing.assert_close(default, window_attention(q, k, v, layout, 2, scale=0.5))
    assert not torch.allclose(default, window_attention(q, k, v, layout, 2, scale=1.0))


@pytest.mark.parametrize("implementation", ON_CPU)
def test_every_implementation_can_be_chosen(implementation: Any) -> None:
    q, k, v = draw(9)
    layout = Layout.from_lengths([4, 5], [[0], []])
    band: Any = {"causal": True, "dilation": [1, 2]}

    out, lse = window_attention_with_lse(q, k, v, layout, 1, implementation=implementation, **band)

    expected = window_attention_with_lse(q, k, v, layout, 1, implementation="reference", **band)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])
    alone = window_attention(q, k, v, layout, 1, implementation=implementation, **band)
    assert torch.equal(out, alone)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("implementation", ON_CPU)
def test_autocast_decides_on_the_dtype(implementation: Any, p: float) -> None:
    q, k, v = draw(20)
    layout = Layout.from_lengths([20], [[0]])

    def attend(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return window_attention_with_lse(
            *inputs, layout, 3, dropout_p=p, implementation=implementation
        )

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = attend(q, k.bfloat16(), v)
    expected = attend(*(x.bfloat16() for x in (q, k, v)))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_two_attentions_become_one_by_their_lse() -> None:
    """To the keys up to the query, and to those from it on; the query itself is in both."""
    q, k, v = draw(30).double()
    layout = Layout.from_lengths([30])
    turned = [x.flip(0) for x in (q, k, v)]

    before, lse_before = window_attention_with_lse(q, k, v, layout, 5, causal=True)
    after, lse_after = (
        x.flip(0) for x in window_attention_with_lse(*turned, layout, 5, causal=True)
    )

    own = (q * k).sum(-1) / 2
    weights = [lse.exp() for lse in (lse_before, lse_after)]
    total = weights[0] + weights[1] - own.exp()
    mixed = before * weights[0][..., None] + after * weights[1][..., None]
    both, lse = window_attention_with_lse(q, k, v, layout, 5)
    torch.testing.assert_close((mixed - own.exp()[..., None] * v) / total[..., None], both)
    torch.testing.assert_close(total.log(), lse)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_dropout_follows_torchs_generator(implementation: Any) -> None:
    q, k, v = draw(20)
    layout = Layout.from_lengths([20])

    def attend(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return window_attention(q, k, v, layout, 3, dropout_p=0.5, implementation=implementation)

    assert torch.equal(attend(1), attend(1))
    assert not torch.allclose(attend(1), attend(2))


def test_what_does_not_fit_is_named() -> None:
    x = torch.zeros(4, 2, 8)
    layout = Layout.from_lengths([4])

    with pytest.raises(ShapeError, match=r"\[4, 2, 8\], \[3, 2, 8\]"):
        window_attention(x, x[:3], x, layout, 1)
    with pytest.raises(ShapeError, match=r"q has shape \[4, 16\]"):
        window_attention(x.flatten(1), x, x, layout, 1)
    with pytest.raises(ShapeError, match=r"of torch\.float32, torch\.float64, torch\.float32"):
        window_attention(x, x.double(), x, layout, 1)
    with pytest.raises(ShapeError, match="hold 4 tokens but the layout describes 5"):
        window_attention(x, x, x, Layout.from_lengths([5]), 1)
    with pytest.raises(ShapeError, match="radius is 0"):
        window_attention(x, x, x, layout, 0)
    with pytest.raises(ShapeError, match=r"dilation is \[1, 2, 3\] for 2 heads"):
        window_attention(x, x, x, layout, 1, dilation=[1, 2, 3])
    with pytest.raises(ShapeError, match="dilation is 0"):
        window_attention_with_lse(x, x, x, layout, 1, dilation=0)
    with pytest.raises(ShapeError, match="layout is on meta"):
        window_attention(x, x, x, Layout.from_lengths([4], device="meta"), 1)
    with pytest.raises(ConfigError, match=r"dropout_p is 1\.5"):
        window_attention(x, x, x, layout, 1, dropout_p=1.5)
    with pytest.raises(ConfigError, match="no implementation 'flash'"):
        window_attention(x, x, x, layout, 1, implementation="flash")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot run: kernels need a CUDA device"):
        window_attention(x, x, x, layout, 1, implementation="fused")


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.zeros(4, 2, 8)
    layout = Layout.from_lengths([4])
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(3):
            window_attention(x, x, x, layout, 1)
            window_attention(x, x, x, layout, 1, implementation="blocked")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "blocked, without Triton: kernels need a CUDA device" in caplog.text


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from longformer_core import Layout, window_attention
x = torch.ones(4, 2, 8)
print(window_attention(x, x, x, Layout.from_lengths([4]), 1).sum().item())
"""


def test_it_runs_where_triton_is_not_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 64


def test_a_compiled_graph_is_one_whatever_the_band() -> None:
    x = draw(20)
    layout = Layout.from_lengths([20], [[0]])

    def attend(x: Tensor) -> tuple[Tensor, Tensor]:
        return window_attention_with_lse(*x, layout, 3, causal=True, dilation=[1, 2])

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for mine, expected in zip(compiled(x), attend(x), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.gpu
def test_a_gpu_without_a_kernel_for_the_case_says_so(caplog: pytest.LogCaptureFixture) -> None:
    layout = Layout.from_lengths([40], [[0]], device="cuda")
    log_once.cache_clear()
    for head_dim in (8, 8, 144):
        q, k, v = draw(40, head_dim).cuda()
        out = window_attention(q, k, v, layout, 3)
        expected = window_attention(q, k, v, layout, 3, implementation="reference")
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
        with pytest.raises(ConfigError, match=f"16 to 128, not {head_dim}"):
            window_attention(q, k, v, layout, 3, implementation="fused")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
