import torch

from longformer_core.attention.band import Band
from longformer_core.attention.reference import reference_attention, visible_keys
from longformer_core.layout import Layout


def test_the_mask_is_band_or_global_and_valid() -> None:
    valid = torch.tensor([True, True, True, True, False])

    sees = visible_keys(5, Band.of(1, 1), (3,), valid)[0]

    assert sees.int().tolist() == [
        [1, 1, 0, 1, 0],
        [1, 1, 1, 1, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]


def test_it_is_a_softmax_over_the_visible_keys() -> None:
    q, k, v = torch.randn(3, 4, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    layout = Layout.from_lengths([4], [[0]])

    out, _ = reference_attention(q, k, v, layout, Band.of(1, 1), 0.5)

    weights = torch.tensor([(q[3, 0] @ k[j, 0] * 0.5).exp().item() for j in (0, 2, 3)]).double()
    expected = weights / weights.sum() @ v[[0, 2, 3], 0]
    torch.testing.assert_close(out[3, 0], expected, rtol=1e-6, atol=0)


def test_documents_do_not_see_each_other_and_no_key_gives_zeros() -> None:
    q, k, v = torch.ones(3, 5, 1, 1)
    v[:, 0, 0] = torch.tensor([1.0, 1.0, 5.0, 5.0, 7.0])
    layout = Layout.from_lengths([2, 2, 1], valid=torch.tensor([1, 1, 1, 1, 0]))

    out, _ = reference_attention(q, k, v, layout, Band.of(9, 1), 1.0)

    assert out.flatten().tolist() == [1.0, 1.0, 5.0, 5.0, 0.0]
