from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional

from longformer_core.config import LEDConfig
from longformer_core.layout import Layout
from longformer_core.models.base import activation
from longformer_core.models.led import LEDForConditionalGeneration
from tests.helpers import TINY


def test_a_model_survives_its_directory(tmp_path: Path) -> None:
    model = LEDForConditionalGeneration(LEDConfig(vocab_size=50, **TINY)).eval()
    model.save_pretrained(tmp_path)

    again = LEDForConditionalGeneration.from_pretrained(tmp_path)

    assert not again.training
    assert again.lm_head.weight is again.led.shared.weight
    assert again.config.attention_window == model.config.attention_window
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_the_published_library_reads_what_was_saved(tmp_path: Path) -> None:
    model = LEDForConditionalGeneration(LEDConfig(vocab_size=50, **TINY)).eval()
    model.save_pretrained(tmp_path)

    theirs, info = transformers.LEDForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weights = theirs.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_cast_while_loading(led_directory: Path, dtype: torch.dtype) -> None:
    model = LEDForConditionalGeneration.from_pretrained(led_directory, dtype=dtype)

    assert model.dtype == dtype
    assert model.device == torch.device("cpu")
    assert model.final_logits_bias.dtype == dtype
    with torch.no_grad():
        states = model.encode(torch.tensor([0, 5, 6, 2]), Layout.from_lengths([4], [[0]]))
    assert states.isfinite().all()


def test_activations_go_by_their_published_names() -> None:
    x = torch.linspace(-3, 3, 50)

    for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh"):
        theirs = transformers.activations.ACT2FN[name](x)
        torch.testing.assert_close(activation(name)(x), theirs)
    assert not torch.equal(activation("gelu_new")(x), functional.gelu(x))
