"""Modules made as skeletons have shapes and no weights, and others are made as ever."""

import torch
from torch import nn

from longformer_core.checkpoints.meta_init import meta_init
from longformer_core.config import LEDConfig
from longformer_core.models.led import LEDForConditionalGeneration
from tests.helpers import TINY


def test_nothing_is_drawn() -> None:
    before = torch.get_rng_state()

    with meta_init():
        model = LEDForConditionalGeneration(LEDConfig(**TINY))

    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))
    assert torch.equal(torch.get_rng_state(), before)
    drawn = LEDForConditionalGeneration(LEDConfig(**TINY)).state_dict()
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    assert shapes == {name: x.shape for name, x in drawn.items()}


def test_modules_made_afterwards_have_weights() -> None:
    with meta_init():
        nn.Embedding(5, 6, 0)
    table, linear = nn.Embedding(5, 6, 0), nn.Linear(3, 4)
    for weight in (table.weight, linear.weight):
        assert weight.device.type == "cpu"
        assert weight.std() > 0
