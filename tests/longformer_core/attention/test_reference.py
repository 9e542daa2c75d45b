"""The definition against a loop over queries and keys that says it once more."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longformer_core.attention.band import Band
from longformer_core.attention.philox import is_kept
from longformer_core.attention.reference import reference_attention, visible_keys
from longformer_core.layout import Layout


def draw(num_tokens: int, num_heads: int = 2, head_dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, num_tokens, num_heads, head_dim, generator=generator, dtype=torch.float64)
    return x[0], x[1], x[2]


def test_the_mask_is_band_or_global_and_valid() -> None:
    valid = torch.tensor([True, True, True, True, False])

    sees = visible_keys(5, Band.of(1, 1), (3,), valid)

    assert sees.int().tolist() == [
        [
            [1, 1, 0, 1, 0],
            [1, 1, 1, 1, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0],
        ]
    ]


def test_the_mask_of_a_causal_band_with_a_dilation_for_each_head() -> None:
    sees = visible_keys(6, Band.of(1, 2, [1, 3], causal=True), (2,), None)

    assert sees.int().tolist() == [
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 1, 0, 1, 1],
        ],
        [
            [1, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [1, 0, 1, 1, 0, 0],
            [0, 1, 1, 0, 1, 0],
            [0, 0, 1, 0, 0, 1],
        ],
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilations", [(1, 1), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("radius", [1, 2, 30])
def test_it_is_a_softmax_over_the_visible_keys(
    radius: int, dilations: tuple[int, int], causal: bool
) -> None:
    q, k, v = draw(17)
    valid = torch.ones(17, dtype=torch.bool)
    valid[[4, 11]] = False
    layout = Layout.from_lengths([12, 5], [[0, 6], []], valid)

    out, lse = reference_attention(
        q, k, v, layout, Band.of(radius, 2, dilations, causal=causal), 0.5
    )

    for i in range(17):
        start, end, chosen = (0, 12, (0, 6)) if i < 12 else (12, 17, ())
        for h, dilation in enumerate(dilations):
            seen = []
            for j in range(start, end):
                apart = abs(i - j)
                in_band = apart <= radius * dilation and apart % dilation == 0
                is_past = j <= i or not causal
                if valid[i] and valid[j] and is_past and (in_band or j in chosen):
                    seen.append(j)
            weights = [math.exp(float(q[i, h] @ k[j, h]) * 0.5) for j in seen]
            expected = sum(
                (w * v[j, h] for w, j in zip(weights, seen, strict=True)), torch.zeros(3).double()
            ) / max(sum(weights), 1e-300)
            torch.testing.assert_close(out[i, h], expected)
            log = math.log(sum(weights)) if seen else -math.inf
            assert float(lse[i, h]) == pytest.approx(log)


def test_documents_do_not_see_each_other_and_no_key_gives_zeros() -> None:
    q, k, v = torch.ones(3, 5, 1, 1)
    v[:, 0, 0] = torch.tensor([1.0, 1.0, 5.0, 5.0, 7.0])
    layout = Layout.from_lengths([2, 2, 1], valid=torch.tensor([1, 1, 1, 1, 0]))

    out, lse = reference_attention(q, k, v, layout, Band.of(9, 1), 1.0)

    assert out.flatten().tolist() == [1.0, 1.0, 5.0, 5.0, 0.0]
    assert lse[4, 0] == -torch.inf
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_that_of_the_counters(p: float) -> None:
    """With unit vectors as values a row of the output is its probabilities."""
    n, start, seed = 9, 4, 2**61 + 12345
    layout = Layout.from_lengths([start, n], [[], [0]])
    q, k, _ = draw(start + n, head_dim=n)
    v = torch.zeros(start + n, 2, n, dtype=torch.float64)
    v[start:] = torch.eye(n, dtype=torch.float64)[:, None]
    band = Band.of(2, 2, [1, 2], causal=True)

    whole, whole_lse = reference_attention(q, k, v, layout, band, 1.0)
    out, lse = reference_attention(q, k, v, layout, band, 1.0, (p, seed))

    slots = torch.arange(start, start + n)
    kept = is_kept(p, seed, slots, slots, 2).transpose(0, 1)
    expected = torch.zeros_like(whole[start:]) if p == 1 else whole[start:] * kept / (1 - p)
    torch.testing.assert_close(out[start:], expected, rtol=1e-12, atol=0)
    assert torch.equal(lse, whole_lse)


@pytest.mark.parametrize("dropout", [(0.0, 0), (0.4, 77)], ids=str)
def test_gradcheck(dropout: tuple[float, int]) -> None:
    layout = Layout.from_lengths([6, 3], [[0, 4], []])
    inputs = [x.requires_grad_() for x in draw(9, head_dim=2)]
    bands: list[Any] = [Band.of(2, 2), Band.of(1, 2, [1, 2], causal=True)]
    for band in bands:
        assert torch.autograd.gradcheck(
            lambda *x, band=band: reference_attention(*x, layout, band, 0.7, dropout)[0], inputs
        )
