"""Weights go to transformers and come back, in every published file format."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from longformer_core.checkpoints.directory import check_directory, list_model_files
from longformer_core.checkpoints.weights import load_into, read_state_dict, write_state_dict
from longformer_core.config import LEDConfig
from longformer_core.errors import CheckpointError
from longformer_core.models.led import LEDForConditionalGeneration
from tests.helpers import TINY, led_weights, make_led_directory, trained_tokenizer_directory

ALIASES = ("led.encoder.embed_tokens.weight", "led.decoder.embed_tokens.weight", "lm_head.weight")
SMALL = {**TINY, "vocab_size": 120, "max_encoder_position_embeddings": 64}


@pytest.fixture(scope="module")
def published() -> transformers.LEDForConditionalGeneration:
    torch.manual_seed(0)
    return transformers.LEDForConditionalGeneration(transformers.LEDConfig(**SMALL))


def tiny_model(seed: int = 0) -> LEDForConditionalGeneration:
    torch.manual_seed(seed)
    return LEDForConditionalGeneration(LEDConfig(**SMALL))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    yield
    assert same(before, module.state_dict())


def test_transformers_loads_what_we_write_with_nothing_missing_or_left_over(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    write_state_dict(model, tmp_path)
    theirs, info = transformers.LEDForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert same(model.state_dict(), theirs.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert set(ALIASES).isdisjoint(read_state_dict(tmp_path))


def test_the_tests_own_tiny_directory_is_a_published_one(led_directory: Path) -> None:
    theirs, info = transformers.LEDForConditionalGeneration.from_pretrained(
        led_directory, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert check_directory(led_directory) == []
    assert theirs.generation_config.num_beams == 2


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_we_load_what_transformers_writes(
    published: transformers.LEDForConditionalGeneration, tmp_path: Path, shard_size: str
) -> None:
    published.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert ((tmp_path / "model.safetensors.index.json").exists()) == (shard_size == "20KB")
    model = tiny_model(1)
    load_into(model, read_state_dict(tmp_path))
    assert same(model.state_dict(), published.state_dict())
    assert model.lm_head.weight is model.led.shared.weight


@pytest.mark.parametrize("zipped", [True, False])
def test_we_load_pickled_weights_whole_and_sharded(
    published: transformers.LEDForConditionalGeneration, tmp_path: Path, zipped: bool
) -> None:
    weights = published.state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    whole = read_state_dict(tmp_path)
    assert same(whole, dict(weights))
    (tmp_path / "pytorch_model.bin").unlink()
    names = list(weights)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = tiny_model(1)
    load_into(model, read_state_dict(tmp_path))
    assert same(model.state_dict(), dict(weights))


def test_pickles_that_hold_more_than_tensors_are_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    file = tmp_path / "pytorch_model.bin"
    for payload in ({"x": Payload()}, Payload()):
        torch.save(payload, file)
        with pytest.raises(CheckpointError, match="plain tensors"):
            read_state_dict(tmp_path)
    file.write_bytes(pickle.dumps({"x": Path("a")}, protocol=2))
    with pytest.raises(CheckpointError, match="plain tensors"):
        read_state_dict(tmp_path)
    torch.save({"x": 3}, file)
    with pytest.raises(CheckpointError, match="dictionary of tensors"):
        read_state_dict(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kept", ["led.shared.weight", *ALIASES])
def test_any_tied_name_stands_for_all(kept: str) -> None:
    weights = led_weights(LEDConfig(**SMALL))
    shared = weights.pop("led.shared.weight")
    model = tiny_model()
    load_into(model, {**weights, kept: shared})
    for name in ("led.shared.weight", *ALIASES):
        assert torch.equal(model.get_parameter(name), shared)


def test_tied_names_that_differ_are_refused() -> None:
    weights = led_weights(LEDConfig(**SMALL))
    other = weights["led.shared.weight"] + 1
    model = tiny_model()
    with unchanged(model), pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        load_into(model, {**weights, "lm_head.weight": other})


def test_one_error_lists_everything_and_changes_nothing() -> None:
    weights = led_weights(LEDConfig(**SMALL))
    del weights["led.encoder.layers.0.fc1.bias"]
    weights["led.encoder.layers.9.fc1.bias"] = torch.zeros(3)
    weights["led.decoder.embed_positions.weight"] = torch.zeros(7, 32)
    model = tiny_model()
    with unchanged(model), pytest.raises(CheckpointError) as caught:
        load_into(model, weights)
    message = str(caught.value)
    assert "1 missing: led.encoder.layers.0.fc1.bias" in message
    assert "1 unexpected: led.encoder.layers.9.fc1.bias" in message
    assert "led.decoder.embed_positions.weight is [7, 32], the model needs [128, 32]" in message


def test_an_absent_optional_weight_becomes_zero() -> None:
    weights = led_weights(LEDConfig(**SMALL))
    del weights["final_logits_bias"]
    model = tiny_model()
    with pytest.raises(CheckpointError, match="missing: final_logits_bias"):
        load_into(model, weights)
    model.final_logits_bias.fill_(5.0)
    load_into(model, weights, optional=["final_logits_bias"])
    assert torch.equal(model.final_logits_bias, torch.zeros(1, 120))


def test_names_of_old_checkpoints_are_understood() -> None:
    module = nn.ModuleDict({"LayerNorm": nn.LayerNorm(2)})
    weights = {
        "LayerNorm.gamma": torch.tensor([3.0, 4.0]),
        "LayerNorm.beta": torch.tensor([5.0, 6.0]),
        "longformer.embeddings.position_ids": torch.arange(3),
    }
    load_into(module, weights)
    assert module["LayerNorm"].weight.tolist() == [3.0, 4.0]
    assert module["LayerNorm"].bias.tolist() == [5.0, 6.0]


def test_a_meta_module_takes_the_tensors_in_its_own_dtype_and_stays_tied() -> None:
    weights = led_weights(LEDConfig(**SMALL))
    with torch.device("meta"):
        model = LEDForConditionalGeneration(LEDConfig(**SMALL)).to(torch.bfloat16)
    load_into(model, weights)
    assert all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in model.parameters())
    assert model.lm_head.weight is model.led.shared.weight is model.led.decoder.embed_tokens.weight
    expected = weights["led.encoder.layers.1.fc1.weight"].to(torch.bfloat16)
    assert torch.equal(model.led.encoder.layers[1].fc1.weight, expected)
    assert torch.equal(model.final_logits_bias, weights["final_logits_bias"].to(torch.bfloat16))


def test_sixteen_bits_survive_the_round_trip(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    write_state_dict(model, tmp_path)
    again = tiny_model(1).to(torch.bfloat16)
    load_into(again, read_state_dict(tmp_path))
    assert same(model.state_dict(), again.state_dict())


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state_dict(tiny_model(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(_tensors: object, path: str, **_options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("longformer_core.checkpoints.weights.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        write_state_dict(tiny_model(1), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_files_that_can_change_a_result(tmp_path: Path) -> None:
    make_led_directory(tmp_path, tokenizer=trained_tokenizer_directory())
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read, since safetensors come first")
    assert [p.name for p in list_model_files(tmp_path)] == [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "vocab.json",
    ]
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    names = {p.name for p in list_model_files(tmp_path)}
    assert {"model-1.safetensors", "model.safetensors.index.json"} < names


def test_problems_are_found_without_loading(tmp_path: Path) -> None:
    model = make_led_directory(tmp_path / "m", tokenizer=trained_tokenizer_directory())
    assert check_directory(model) == []
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-10])
    assert "is damaged" in check_directory(model)[0]
    (model / "model.safetensors").unlink()
    assert "has no weights" in check_directory(model)[0]
    (model / "pytorch_model.bin").touch()
    assert "is empty" in check_directory(model)[0]
    index = model / "model.safetensors.index.json"
    for names, message in (
        (["gone.safetensors"], "lacks 1 of 1 shards: gone.safetensors"),
        (["../other/model.safetensors"], "files of its own directory"),
        ([], "files of its own directory"),
    ):
        index.write_text(json.dumps({"weight_map": dict(enumerate(names))}))
        assert message in check_directory(model)[0]
    index.write_text("{}")
    assert "not an index" in check_directory(model)[0]
    (model / "merges.txt").unlink()
    (model / "config.json").write_text(json.dumps({"model_type": "t5"}))
    config, shards, tokenizer = check_directory(model)
    assert "'t5'" in config
    assert "index" in shards
    assert "no tokenizer" in tokenizer
    assert "not a directory" in check_directory(tmp_path / "absent")[0]


def test_a_tokenizer_larger_than_the_model_is_a_problem(tmp_path: Path) -> None:
    model = make_led_directory(tmp_path, tokenizer=trained_tokenizer_directory(), vocab_size=100)
    (problem,) = check_directory(model)
    assert "vocab_size 100" in problem
