"""The dense matrix against the operation itself: probabilities times values are its output."""

import pytest
import torch
from torch import Tensor

from longformer_core.attention.dense import dense_probabilities
from longformer_core.attention.window import window_attention
from longformer_core.errors import ShapeError
from longformer_core.layout import Layout

N, H, D = 37, 3, 8


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("radius", [1, 5, 60])
@pytest.mark.parametrize("positions", [(), (0,), (3, 20, 36)])
@pytest.mark.parametrize("masked", [(), (4, 5, 6, 35)])
def test_it_is_the_operations_softmax(
    radius: int, positions: tuple[int, ...], masked: tuple[int, ...]
) -> None:
    q, k, v, k_global = (draw(N, H, D, seed=seed) for seed in range(4))
    q_global = draw(len(positions), H, D, seed=9)
    valid = torch.ones(N, dtype=torch.bool)
    valid[list(masked)] = False
    layout = Layout.from_lengths([N], [positions], valid)
    weights = dense_probabilities(q, k, layout, radius, q_global=q_global, k_global=k_global)
    assert weights.dtype == torch.float64
    assert torch.allclose(weights.sum(-1), valid.double().expand(H, N))
    out = torch.einsum("hij,jhe->ihe", weights, v)
    local = [i for i in range(N) if i not in positions]
    expected = window_attention(q, k, v, layout, radius)
    assert torch.allclose(out[local], expected[local], atol=1e-12)
    for row, position in enumerate(positions):
        scores = torch.einsum("he,jhe->hj", q_global[row], k_global) / D**0.5
        rows = scores.masked_fill(~valid, -torch.inf).softmax(-1)
        assert torch.allclose(weights[:, position], rows)


def test_what_does_not_fit_is_named() -> None:
    q = draw(N, H, D, seed=0)
    one, two = Layout.from_lengths([N], [[0]]), Layout.from_lengths([N - 1, 1])
    with pytest.raises(ShapeError, match="2 documents"):
        dense_probabilities(q, q, two, 2)
    with pytest.raises(ShapeError, match="with 37 tokens"):
        dense_probabilities(q, q[1:], one, 2)
    with pytest.raises(ShapeError, match=r"1 global tokens needs .1, 3, 8. and"):
        dense_probabilities(q, q, one, 2)
