import pytest
import torch

from longformer_core.attention import window_attention
from longformer_core.errors import ConfigError, ShapeError
from longformer_core.layout import Layout


def test_scale_defaults_to_the_root_of_the_head_dimension() -> None:
    q, k, v = torch.randn(3, 6, 2, 4, generator=torch.Generator().manual_seed(0))
    layout = Layout.from_lengths([6])

    default = window_attention(q, k, v, layout, 2)

    torch.testing.assert_close(default, window_attention(q, k, v, layout, 2, scale=0.5))
    assert not torch.allclose(default, window_attention(q, k, v, layout, 2, scale=1.0))


@pytest.mark.parametrize("implementation", ["auto", "blocked", "reference"])
def test_every_implementation_can_be_chosen(implementation: str) -> None:
    q, k, v = torch.randn(3, 9, 2, 4, generator=torch.Generator().manual_seed(0))
    layout = Layout.from_lengths([4, 5], [[0], []])

    out = window_attention(q, k, v, layout, 1, implementation=implementation)  # type: ignore[arg-type]

    torch.testing.assert_close(
        out, window_attention(q, k, v, layout, 1, implementation="reference")
    )


def test_what_does_not_fit_is_named() -> None:
    x = torch.zeros(4, 2, 8)
    layout = Layout.from_lengths([4])

    with pytest.raises(ShapeError, match=r"\[4, 2, 8\], \[3, 2, 8\]"):
        window_attention(x, x[:3], x, layout, 1)
    with pytest.raises(ShapeError, match="hold 4 tokens but the layout describes 5"):
        window_attention(x, x, x, Layout.from_lengths([5]), 1)
    with pytest.raises(ShapeError, match="radius is 0"):
        window_attention(x, x, x, layout, 0)
    with pytest.raises(ShapeError, match="layout is on meta"):
        window_attention(x, x, x, Layout.from_lengths([4], device="meta"), 1)
    with pytest.raises(ConfigError, match="no implementation 'flash'"):
        window_attention(x, x, x, layout, 1, implementation="flash")  # type: ignore[arg-type]
