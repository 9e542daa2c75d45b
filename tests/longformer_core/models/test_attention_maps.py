"""Dense maps against the attentions that the published models return in their banded format."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from longformer_core.errors import ConfigError, ShapeError
from longformer_core.models.attention_maps import attention_dense
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.models.longformer import LongformerForMaskedLM
from tests.helpers import TINY

VOCAB, N = 60, 41
WINDOWS = [8, 16]
GLOBALS = ((), (0,), (0, 5, 33), (N - 1,))
LONGFORMER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "attention_window": WINDOWS,
    # With the default of 0.02 the attention is uniform and no comparison could see it.
    "initializer_range": 0.3,
}
IDS = torch.randint(4, VOCAB, (N,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["longformer", "led"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(2)
    folder: Path = tmp_path_factory.mktemp(request.param)
    published: Any
    if request.param == "led":
        config = transformers.LEDConfig(**TINY | {"vocab_size": VOCAB, "attention_window": WINDOWS})
        published = transformers.LEDForConditionalGeneration(config)
        published.eval().save_pretrained(folder)
        return published.led.encoder, LEDForConditionalGeneration.from_pretrained(folder)
    published = transformers.LongformerForMaskedLM(transformers.LongformerConfig(**LONGFORMER))
    published.eval().save_pretrained(folder)
    return published.longformer, LongformerForMaskedLM.from_pretrained(folder)


def scattered(band: Tensor, rows: Tensor | None, positions: tuple[int, ...], side: int) -> Tensor:
    """The published maps [H, N, x + w + 1] and [H, P, x] as one matrix [H, N, N]."""
    dense = torch.zeros(len(band), N, N)
    dense[:, :, list(positions)] = band[..., : len(positions)]
    for i in range(N):
        for offset in range(2 * side + 1):
            if 0 <= (j := i + offset - side) < N:
                dense[:, i, j] += band[:, i, len(positions) + offset]
    for column, position in enumerate(positions):
        assert rows is not None
        dense[:, position] = rows[:, :N, column]
    return dense


@pytest.mark.parametrize("positions", GLOBALS)
def test_the_published_maps_scattered_are_the_same(pair: Any, positions: tuple[int, ...]) -> None:
    published, ours = pair
    marks = torch.zeros_like(IDS)
    marks[list(positions)] = 1
    with torch.no_grad():
        out = published(IDS[None], global_attention_mask=marks[None], output_attentions=True)
    for layer, window in enumerate(WINDOWS):
        rows = out.global_attentions[layer][0] if positions else None
        expected = scattered(out.attentions[layer][0], rows, positions, window // 2)
        assert torch.allclose(expected.sum(-1), torch.ones(()), atol=1e-5)
        got = attention_dense(ours, IDS, layer, global_positions=positions)
        assert got.shape == (4, N, N)
        assert torch.allclose(got, expected, atol=1e-5)
        # The maps are not uniform: the comparison says something.
        assert got.amax(-1).mean() > 3 / (window + 1)


def test_wrong_requests_are_named(pair: Any) -> None:
    _, ours = pair
    with pytest.raises(ConfigError, match="no layer 2; the encoder has 0 to 1"):
        attention_dense(ours, IDS, 2)
    with pytest.raises(ShapeError, match="give one document"):
        attention_dense(ours, IDS[None], 0)
    with pytest.raises(ShapeError, match="global token at position 41"):
        attention_dense(ours, IDS, 0, global_positions=[41])
