"""Files that the published classes of transformers 4 wrote, in TensorFlow and in old formats.

Runs in an environment of its own: transformers 4.57, tensorflow-cpu, tf-keras and h5py beside
torch, safetensors, tokenizers and pytest.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
pytest.importorskip("tensorflow", reason="needs the environment of the legacy tests")

import transformers
from transformers.modeling_tf_pytorch_utils import load_tf2_model_in_pytorch_model

from longformer_core.checkpoints.weights import load_into, read_state_dict
from longformer_core.config import LEDConfig
from longformer_core.models import led, longformer

# The oracle is old; what it warns of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

LONGFORMER: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "type_vocab_size": 2,
    "attention_window": [8, 4],
    "num_labels": 2,
}
LED: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "attention_window": [8, 4],
    "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 32,
}
NAMES = (
    "LongformerModel",
    "LongformerForMaskedLM",
    "LongformerForSequenceClassification",
    "LongformerForTokenClassification",
    "LongformerForQuestionAnswering",
    "LongformerForMultipleChoice",
    "LEDForConditionalGeneration",
)


def config_of(name: str) -> Any:
    if name.startswith("LED"):
        return transformers.LEDConfig(**LED)
    return transformers.LongformerConfig(**LONGFORMER)


def loaded(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Our weights of a directory."""
    module = led if name.startswith("LED") else longformer
    model = getattr(module, name).from_pretrained(folder)
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def write_tensorflow(name: str, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Write a TensorFlow model of distinct weights; return them as the published torch class's."""
    model = getattr(transformers, f"TF{name}")(config_of(name))
    model.build_in_name_scope()
    draw = torch.Generator().manual_seed(0)
    for variable in model.weights:
        noise = torch.randn(tuple(variable.shape), generator=draw)
        variable.assign_add(noise.numpy())
    model.save_pretrained(folder, **options)
    published = getattr(transformers, name)(config_of(name))
    load_tf2_model_in_pytorch_model(published, model, allow_missing_keys=True)
    published.tie_weights()
    weights: dict[str, torch.Tensor] = published.state_dict()
    if "final_logits_bias" in weights:  # a buffer, which the published conversion passes over
        weights["final_logits_bias"] = torch.from_numpy(model.bias_layer.bias.numpy())
    return weights


@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
@pytest.mark.parametrize("name", NAMES)
def test_tensorflow(tmp_path: Path, name: str, shard_size: str) -> None:
    theirs = write_tensorflow(name, tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "tf_model.h5").exists() == (shard_size == "5GB")
    ours = loaded(name, tmp_path)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


def test_an_led_without_a_head_in_tensorflow(tmp_path: Path) -> None:
    theirs = write_tensorflow("LEDModel", tmp_path)
    ours = loaded("LEDForConditionalGeneration", tmp_path)
    for key, value in theirs.items():
        assert torch.equal(value, ours[f"led.{key}"]), key


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
@pytest.mark.parametrize("name", NAMES)
def test_torch(tmp_path: Path, name: str, shard_size: str, safe: bool) -> None:
    torch.manual_seed(0)
    published = getattr(transformers, name)(config_of(name))
    published.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size=shard_size)
    ours = loaded(name, tmp_path)
    for key, value in published.state_dict().items():
        assert torch.equal(value, ours[key]), key


def test_a_pickle_keeps_tied_copies_and_they_agree(tmp_path: Path) -> None:
    published = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**LED))
    published.save_pretrained(tmp_path, safe_serialization=False)
    weights = read_state_dict(tmp_path)
    assert "lm_head.weight" in weights
    load_into(led.LEDForConditionalGeneration(LEDConfig(**LED)), weights)


@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_the_old_classes_read(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    getattr(transformers, name)(config_of(name)).save_pretrained(tmp_path / "theirs")
    module = led if name.startswith("LED") else longformer
    ours = getattr(module, name).from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    published, told = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in ours.state_dict().items():
        assert torch.equal(value, published.state_dict()[key]), key
