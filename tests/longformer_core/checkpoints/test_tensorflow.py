"""`tf_model.h5` in the layout that the published TensorFlow classes wrote.

The files are laid out here by hand from a published model's weights; tests/legacy compares with
files that TensorFlow wrote.
"""

import json
import re
import sys
from pathlib import Path

import h5py
import pytest
import torch
import transformers
from torch import Tensor, nn

from longformer_core.checkpoints.directory import check_directory, list_model_files
from longformer_core.checkpoints.weights import read_state_dict
from longformer_core.errors import CheckpointError
from longformer_core.models import longformer
from longformer_core.models.led import LEDForConditionalGeneration
from tests.helpers import TINY, trained_tokenizer_directory
from tests.longformer_core.models.test_longformer import CONFIG, HEADS

SMALL = {**TINY, "vocab_size": 2100, "max_encoder_position_embeddings": 64}


def address(name: str, module: nn.Module, model: str) -> str:
    """Where Keras keeps a weight: group / model / parts / leaf:0."""
    stem, _, leaf = name.rpartition(".")
    if not stem:
        return f"{name}/{name}:0"
    if isinstance(module, nn.LayerNorm):
        leaf = {"weight": "gamma", "bias": "beta"}[leaf]
    elif leaf == "weight":
        leaf = "kernel" if isinstance(module, nn.Linear) else "embeddings"
    if stem == "led.shared":
        return f"led/led.shared/led.shared/{leaf}:0"
    if stem.endswith("word_embeddings"):
        leaf = "weight"
    path = re.sub(r"layer/(\d+)", r"layer_._\1", stem.replace(".", "/"))
    path = re.sub(r"layers/(\d+)", r"layers.\1", path)
    return f"{path.split('/')[0]}/{model}/{path}/{leaf}:0"


def write_h5(published: nn.Module, path: Path, skip: tuple[str, ...]) -> dict[str, Tensor]:
    """Write a published model's weights, and return them."""
    weights = {n: t for n, t in published.state_dict().items() if n not in skip}
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.21.0"
        file.create_group("top_level_model_weights").attrs["weight_names"] = []
        for name, tensor in weights.items():
            module = published.get_submodule(name.rpartition(".")[0])
            where = address(name, module, f"tf{type(published).__name__.lower()}_1")
            is_kernel = where.endswith("kernel:0")
            file[where] = (tensor.T if is_kernel else tensor).contiguous().numpy()
            if "embeddings" in name and hasattr(published, "lm_head"):
                file["lm_head" + where[where.index("/") :]] = tensor.numpy()  # Keras repeats it
    return weights


def copy_as_shard(source: h5py.File, target: h5py.File) -> None:
    """Write the content of a whole file as shards hold it: without the names of layer and model."""

    def copy(where: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            short = where.split("/", 2)[2] if where.count("/") > 1 else where.split("/")[-1]
            target[short] = item[()]

    source.visititems(copy)


@pytest.mark.parametrize("name", ["LongformerModel", *HEADS])
def test_longformer(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    labels = 2 if "Question" in name else 3
    config = transformers.LongformerConfig(**CONFIG, num_labels=labels)
    published = getattr(transformers, name)(config)
    config.save_pretrained(tmp_path)
    tied = ("lm_head.decoder.weight", "lm_head.decoder.bias")
    if name == "LongformerModel":  # the base class too is one layer, called longformer
        published = nn.ModuleDict({"longformer": published})
    weights = write_h5(published, tmp_path / "tf_model.h5", skip=tied)
    assert read_state_dict(tmp_path).keys() == weights.keys()
    ours = getattr(longformer, name).from_pretrained(tmp_path)
    for key, weight in ours.state_dict().items():
        key = f"longformer.{key}" if name == "LongformerModel" else key
        if key not in tied:
            assert torch.equal(weight, weights[key]), key


def test_led(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**SMALL))
    with torch.no_grad():
        published.final_logits_bias.normal_()
    published.config.save_pretrained(tmp_path)
    tied = [f"led.{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    write_h5(published, tmp_path / "tf_model.h5", skip=(*tied, "lm_head.weight"))
    ours = LEDForConditionalGeneration.from_pretrained(tmp_path)
    theirs = published.state_dict()
    for key, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs[key]), key


def test_shards_safetensors_first_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**SMALL))
    published.config.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((trained_tokenizer_directory() / name).read_bytes())
    whole = tmp_path / "tf_model.h5"
    weights = write_h5(published, whole, skip=())
    assert check_directory(tmp_path) == []
    shard = tmp_path / "tf_model-00001-of-00001.h5"
    with h5py.File(whole) as source, h5py.File(shard, "w") as target:
        copy_as_shard(source, target)
    whole.unlink()
    index = tmp_path / "tf_model.h5.index.json"
    index.write_text(json.dumps({"weight_map": {"led/led.shared/embeddings:0": shard.name}}))
    read = read_state_dict(tmp_path)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    assert {shard.name, index.name} < {path.name for path in list_model_files(tmp_path)}
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "h5py", None)
        (problem,) = check_directory(tmp_path)
        assert "install longhaul[h5]" in problem
        with pytest.raises(CheckpointError, match=r"install longhaul\[h5\]"):
            read_state_dict(tmp_path)
    shard.write_bytes(shard.read_bytes()[:-3000])
    (problem,) = check_directory(tmp_path)
    assert "is damaged" in problem
    with h5py.File(shard, "w") as file:
        file["group/model/name:0"] = "text"
    with pytest.raises(CheckpointError, match="does not hold weights"):
        read_state_dict(tmp_path)
    published.save_pretrained(tmp_path)
    assert "lm_head.weight" not in read_state_dict(tmp_path)
