"""The config reads and writes what transformers does, and refuses what cannot be run."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import transformers

from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.errors import ConfigError
from tests.helpers import make_led_directory

OWN = ("extra", "generation_defaults")
# Published and not kept: an export switch that its own library no longer reads.
LEFT_OUT = {"attribute_map", "model_type", "onnx_export"}
BOTH = pytest.mark.parametrize("kind", [LEDConfig, LongformerConfig])


@BOTH
def test_names_and_defaults_are_the_published_ones(kind: Any) -> None:
    published = getattr(transformers, kind.__name__)
    ours = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
    theirs = {name: getattr(published(), name) for name in ours if name not in OWN}
    assert {name: value for name, value in ours.items() if name not in OWN} == theirs
    assert set(published.__annotations__) - LEFT_OUT <= set(ours)


@BOTH
@pytest.mark.parametrize("labels", [{0: "x", 1: "y"}, {0: "x", 1: "y", 2: "z"}])
def test_a_file_of_transformers_is_read_and_written_back_whole(
    tmp_path: Path, kind: Any, labels: dict[int, str]
) -> None:
    published = getattr(transformers, kind.__name__)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind is LEDConfig:
        sizes = {"d_model": 64, "encoder_layers": 2}
    published(**sizes, attention_window=[8, 16], id2label=labels).save_pretrained(
        tmp_path / "theirs"
    )
    config = kind.from_pretrained(tmp_path / "theirs")
    assert (config.hidden_size, config.attention_window) == (64, [8, 16])
    assert config.num_labels == len(labels)
    config.save_pretrained(tmp_path / "ours")
    before, after = (
        json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "ours")
    )
    assert {**before, **after} == after
    assert published.from_pretrained(tmp_path / "ours").to_dict() == (
        published.from_pretrained(tmp_path / "theirs").to_dict()
    )


def test_another_number_of_labels_names_them_anew() -> None:
    config = LongformerConfig.from_dict({"id2label": {"0": "x", "1": "y"}})
    config.num_labels = 3
    assert config.to_dict()["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert "num_labels" not in config.to_dict()


def test_saving_names_the_class_and_dtype_of_the_weights_beside_it(tmp_path: Path) -> None:
    config = LEDConfig.from_dict({"model_type": "led", "torch_dtype": "float16"})
    config.save_pretrained(tmp_path, architecture="LEDForConditionalGeneration", dtype="float32")
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["architectures"] == ["LEDForConditionalGeneration"]
    assert stored["dtype"] == "float32"
    assert "torch_dtype" not in stored


def test_generation_keys_are_set_apart_as_transformers_does(tmp_path: Path) -> None:
    generation = {
        "num_beams": 4,
        "max_length": 512,
        "length_penalty": 2.0,
        "early_stopping": True,
        "no_repeat_ngram_size": 3,
        "forced_eos_token_id": 2,
    }
    stored = {"model_type": "led", "prefix": " ", "output_past": False, **generation}
    config = LEDConfig.from_dict(stored)
    assert config.generation_defaults == generation
    assert config.extra == {"prefix": " ", "output_past": False}
    tiny = make_led_directory(tmp_path)
    (tiny / "generation_config.json").unlink()
    (tiny / "config.json").write_text(
        json.dumps({**json.loads((tiny / "config.json").read_text()), **stored})
    )
    config = LEDConfig.from_pretrained(tiny)
    config.save_pretrained(tiny)
    theirs = transformers.LEDForConditionalGeneration.from_pretrained(tiny).generation_config
    assert {name: getattr(theirs, name) for name in generation} == config.generation_defaults


def test_every_generation_option_of_transformers_is_recognised() -> None:
    published = transformers.GenerationConfig._get_default_generation_params()
    stored = {name: 1 for name in published if name != "use_cache"}
    assert LEDConfig.from_dict(stored).generation_defaults == stored


def test_aliases() -> None:
    config = LEDConfig(
        d_model=96, encoder_attention_heads=3, decoder_attention_heads=4, encoder_layers=2
    )
    published = transformers.LEDConfig(
        d_model=96, encoder_attention_heads=3, decoder_attention_heads=4, encoder_layers=2
    )
    for name in transformers.LEDConfig.attribute_map:
        assert getattr(config, name) == getattr(published, name)
    assert config.max_position_embeddings == config.max_encoder_position_embeddings == 16384
    stored = {"hidden_size": 96, "num_attention_heads": 3, "decoder_attention_heads": 4}
    assert LEDConfig.from_dict(stored).d_model == 96
    with pytest.raises(ConfigError, match="d_model twice"):
        LEDConfig.from_dict({"hidden_size": 96, "d_model": 64})


def test_radii_are_one_side_of_each_window() -> None:
    assert LEDConfig(encoder_layers=3).radii == (256, 256, 256)
    assert LEDConfig(encoder_layers=2, attention_window=[8, 32]).radii == (4, 16)


def test_unknown_names_are_errors_with_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean 'attention_window'"):
        LEDConfig(atention_window=8)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="'hidden_size' 'd_model'"):
        LEDConfig(hidden_size=8)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="GenerationConfig"):
        LEDConfig(num_beams=8)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        LEDConfig().atention_window = 8  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_window": 7}, "odd"),
        ({"attention_window": 0}, "attention_window is 0"),
        ({"attention_window": [8, 8]}, "2 windows for 12"),
        ({"attention_window": [8.0] * 12}, "whole number"),
        ({"encoder_attention_heads": 7}, "not divisible by encoder_attention_heads 7"),
        ({"decoder_attention_heads": 7}, "not divisible by decoder_attention_heads 7"),
        ({"d_model": "64"}, "d_model is '64'"),
        ({"encoder_layers": True}, "encoder_layers is True"),
        ({"dropout": 1.5}, "between 0 and 1"),
        ({"init_std": -1.0}, "init_std"),
        ({"activation_function": 3}, "activation_function"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder"),
        ({"vocab_size": 2}, "outside the vocabulary"),
        ({"eos_token_id": [2, 60000]}, "eos_token_id 60000"),
        ({"pad_token_id": -1}, "pad_token_id"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id"),
    ],
)
def test_values_out_of_range_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LEDConfig(**options)
    with pytest.raises(ConfigError, match=message):
        LEDConfig.from_dict(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_window": [8, 8]}, "2 windows for 12"),
        ({"num_attention_heads": 7}, "not divisible by num_attention_heads 7"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ({"hidden_dropout_prob": -0.1}, "between 0 and 1"),
        ({"hidden_act": None}, "hidden_act"),
        ({"problem_type": "guessing"}, "problem_type is 'guessing'"),
        ({"num_labels": 0}, "num_labels is 0"),
        ({"sep_token_id": 40000}, "sep_token_id 40000"),
        ({"initializer_range": -1.0}, "initializer_range"),
    ],
)
def test_values_of_longformer_out_of_range_are_errors(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LongformerConfig(**options)


def test_positions_are_counted_from_behind_the_padding() -> None:
    assert LongformerConfig(max_position_embeddings=4098).max_length == 4096
    assert LongformerConfig(max_position_embeddings=100, pad_token_id=0).max_length == 99


def test_a_value_broken_later_is_not_written(tmp_path: Path) -> None:
    config = LEDConfig()
    config.attention_window = 9
    with pytest.raises(ConfigError, match="odd"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_end_tokens() -> None:
    assert LEDConfig().eos_token_ids == (2,)
    assert LEDConfig(eos_token_id=[2, 5]).eos_token_ids == (2, 5)
    assert LEDConfig(eos_token_id=None).eos_token_ids == ()


def test_copies_and_pickles_are_equal() -> None:
    config = LEDConfig.from_dict({"prefix": " ", "num_beams": 3})
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert LEDConfig.from_dict(config.to_dict()) == config
    assert config != LEDConfig()


def test_other_models_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'bart'"):
        LEDConfig.from_dict({"model_type": "bart"})
    with pytest.raises(ConfigError, match="does not exist"):
        LEDConfig.from_pretrained(tmp_path)
    for text, message in (("{", "JSON"), ("[1]", "list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            LEDConfig.from_pretrained(tmp_path)
