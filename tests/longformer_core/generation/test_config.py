"""GenerationConfig against the published library's reading of the same directories."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import transformers

from longformer_core.config import LEDConfig
from longformer_core.errors import ConfigError
from longformer_core.generation.config import GenerationConfig

MODEL = {"vocab_size": 100, "max_decoder_position_embeddings": 32, "model_type": "led"}


def directory(path: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> Path:
    (path / "config.json").write_text(json.dumps({**MODEL, **config}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def published(path: Path) -> dict[str, Any]:
    """What the published library decodes with when it loads this directory and is told nothing."""
    if (path / "generation_config.json").exists():
        theirs = transformers.GenerationConfig.from_pretrained(path)
    else:
        theirs = transformers.GenerationConfig.from_pretrained(
            path, config_file_name="config.json", _from_model_config=True
        )
    theirs.update(**theirs._get_default_generation_params(), defaults_only=True)
    return theirs.to_dict()


def assert_same(ours: GenerationConfig, theirs: dict[str, Any]) -> None:
    """Compare the options of both libraries; null there is what makes no difference here."""
    neutral = GenerationConfig().to_dict() | dict.fromkeys(IDS)
    for name, value in ours.to_dict().items():
        if name in SHARED:
            assert value == (neutral[name] if theirs[name] is None else theirs[name]), name


SHARED = [
    "min_length", "min_new_tokens", "max_new_tokens", "num_beams", "num_return_sequences",
    "length_penalty", "early_stopping", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "repetition_penalty", "encoder_repetition_penalty", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "do_sample", "temperature", "top_k", "top_p",
    "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "sequence_bias", "renormalize_logits",
    "exponential_decay_length_penalty", "stop_strings",
    "decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id",
]  # fmt: skip
IDS = {"decoder_start_token_id": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({}, IDS),
        (IDS, None),
        ({**IDS, "num_beams": 4, "max_length": 30, "length_penalty": 2.0}, None),
        ({**IDS, "force_bos_token_to_be_generated": True}, None),
        ({**IDS, "num_beams": 4}, {**IDS, "num_beams": 2, "min_length": None}),
        (
            {},
            {**IDS, "eos_token_id": [2, 5], "early_stopping": "never", "transformers_version": "4"},
        ),
        ({}, {**IDS, "bad_words_ids": [[4], [5, 6]], "suppress_tokens": [7], "use_cache": False}),
        ({}, {**IDS, "do_sample": True, "top_k": 5, "top_p": 0.5, "temperature": 0.7}),
        ({}, {**IDS, "typical_p": 1.0, "num_beam_groups": 1, "diversity_penalty": 0.0}),
        ({}, {**IDS, "do_sample": True, "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 1e-3}),
        ({}, {**IDS, "do_sample": True, "eta_cutoff": 1e-3, "renormalize_logits": True}),
        ({}, {**IDS, "sequence_bias": [[[5], -1.0]], "stop_strings": ["a", "b c"]}),
        ({}, {**IDS, "exponential_decay_length_penalty": [4, 1.5]}),
    ],
)
def test_reads_a_directory_as_the_published_library(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None
) -> None:
    path = directory(tmp_path, config, generation)
    ours, theirs = GenerationConfig.from_pretrained(path), published(path)
    assert_same(ours, theirs)
    if "max_length" in config:
        assert ours.total_length == theirs["max_length"]


def test_ids_that_the_options_leave_out_are_the_models(tmp_path: Path) -> None:
    path = directory(tmp_path, {"eos_token_id": 9, "pad_token_id": None}, {"num_beams": 2})
    options = GenerationConfig.from_pretrained(path)
    assert (options.eos_token_ids, options.pad_token_id, options.num_beams) == ((9,), None, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("diversity_penalty", 0.5),
        ("num_beam_groups", 2),
        ("top_h", 0.3),
        ("remove_invalid_values", True),
        ("guidance_scale", 1.5),
    ],
)
@pytest.mark.parametrize("in_config", [True, False])
def test_an_option_we_lack_is_named(
    tmp_path: Path, name: str, value: object, in_config: bool
) -> None:
    options = {name: value}
    path = directory(tmp_path, options if in_config else {}, None if in_config else options)
    with pytest.raises(ConfigError, match=name):
        GenerationConfig.from_pretrained(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 1),
        ("max_new_tokens", 0),
        ("min_length", -1),
        ("num_beams", 0),
        ("num_beams", True),
        ("num_beams", None),
        ("num_return_sequences", 0),
        ("no_repeat_ngram_size", 1.5),
        ("repetition_penalty", 0.0),
        ("length_penalty", float("nan")),
        ("early_stopping", "always"),
        ("early_stopping", 1),
        ("temperature", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("do_sample", "yes"),
        ("eos_token_id", -1),
        ("eos_token_id", "2"),
        ("bad_words_ids", [[]]),
        ("suppress_tokens", [-3]),
        ("min_p", -0.1),
        ("typical_p", 0.0),
        ("epsilon_cutoff", 1.5),
        ("eta_cutoff", None),
        ("exponential_decay_length_penalty", [4]),
        ("exponential_decay_length_penalty", [-1, 1.5]),
        ("sequence_bias", 5),
        ("sequence_bias", [[5, 1.0]]),
        ("sequence_bias", {(5,): "much"}),
        ("sequence_bias", {(): 1.0}),
        ("sequence_bias", {(5, -1): 1.0}),
        ("stop_strings", [""]),
        ("stop_strings", 5),
        ("renormalize_logits", None),
        ("output_scores", 1),
        ("text_of", "decode"),
        ("prefix_allowed_tokens_fn", [1]),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        GenerationConfig().replace(**{name: value})


def test_an_unknown_option_suggests_a_known_one() -> None:
    with pytest.raises(ConfigError, match=r"num_beam'.*did you mean 'num_beams'"):
        GenerationConfig().replace(num_beam=2)
    with pytest.raises(ConfigError, match="did you mean 'max_length'"):
        GenerationConfig(max_lenght=2)  # type: ignore[call-arg]


def test_lengths() -> None:
    options = GenerationConfig()
    assert (options.total_length, options.shortest_length) == (21, 0)
    options = options.replace(max_length=50, min_length=10)
    assert (options.total_length, options.shortest_length) == (50, 10)
    options = options.replace(max_new_tokens=30, min_new_tokens=4)
    assert (options.total_length, options.shortest_length) == (31, 5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_new_tokens": 33}, "max_new_tokens to 32"),
        ({"max_length": 34}, "32 positions"),
        ({"eos_token_id": None}, "eos_token_id"),
        ({"eos_token_id": [2, 100]}, "100"),
        ({"forced_bos_token_id": 100}, "forced_bos_token_id"),
        ({"bad_words_ids": [[5, 100]]}, "bad_words_ids"),
        ({"sequence_bias": {(5, 100): 1.0}}, "sequence_bias"),
        ({"stop_strings": "a"}, "text_of"),
        ({"do_sample": True, "num_return_sequences": 3, "num_beams": 2}, "num_return_sequences"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences"),
    ],
)
def test_check_refuses_what_the_model_cannot_do(options: dict[str, Any], word: str) -> None:
    config = LEDConfig.from_dict(MODEL)
    with pytest.raises(ConfigError, match=word):
        GenerationConfig(**options).check(config)


def test_check_accepts_the_last_position(caplog: pytest.LogCaptureFixture) -> None:
    config = LEDConfig.from_dict(MODEL)
    GenerationConfig(max_new_tokens=32, num_beams=4, num_return_sequences=4).check(config)
    GenerationConfig(do_sample=True, num_return_sequences=4).check(config)
    GenerationConfig(do_sample=True, num_return_sequences=4, num_beams=4).check(config)
    GenerationConfig(stop_strings="a", text_of=str).check(config)  # type: ignore[arg-type]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        GenerationConfig(max_length=8, min_length=9).check(config)
    assert "longer than the longest" in caplog.text


def test_equal_options_are_equal_and_survive_a_round_trip() -> None:
    options = GenerationConfig(bad_words_ids=[[4], [5, 6]], eos_token_id=[2, 3])  # type: ignore[arg-type]
    again = GenerationConfig.from_dict(json.loads(json.dumps(options.to_dict())))
    assert again == options
    assert hash(again) == hash(options)
    assert options != options.replace(num_beams=2)
    names = {f.name for f in dataclasses.fields(GenerationConfig)}
    assert set(options.to_dict()) == names - {"prefix_allowed_tokens_fn", "text_of"}


def test_biases_are_given_as_a_dict_or_as_pairs() -> None:
    given: Any = {(5,): -1.0, (6, 7): 2}
    options = GenerationConfig(sequence_bias=given)
    assert options.sequence_bias == (((5,), -1.0), ((6, 7), 2.0))
    assert options == GenerationConfig(sequence_bias=[[[5], 3.0], [[6, 7], 2.0], [[5], -1.0]])  # type: ignore[arg-type]
    assert hash(options) == hash(GenerationConfig.from_dict(options.to_dict()))


def test_callables_are_told_apart_by_identity() -> None:
    def first(_batch_id: int, _ids: Any) -> list[int]:
        return [2]

    options = GenerationConfig(prefix_allowed_tokens_fn=first)
    assert options == GenerationConfig(prefix_allowed_tokens_fn=first)
    assert hash(options) == hash(GenerationConfig(prefix_allowed_tokens_fn=first))
    assert options != GenerationConfig(prefix_allowed_tokens_fn=lambda _batch_id, _ids: [2])


SAVED: list[dict[str, Any]] = [
    {},
    {"max_length": 30, "num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    {"eos_token_id": [2, 5], "bos_token_id": 3, "pad_token_id": 4, "decoder_start_token_id": 5},
    {"bad_words_ids": [[4], [5, 6]], "suppress_tokens": [7], "forced_eos_token_id": [2, 3]},
    {"do_sample": True, "top_k": 0, "min_p": 0.25, "typical_p": 0.5, "eta_cutoff": 1e-3},
    {"sequence_bias": {(5,): -1.0, (6, 7): 2.0}, "exponential_decay_length_penalty": (4, 1.5)},
    {"stop_strings": ("a", "b"), "renormalize_logits": True, "repetition_penalty": 2},
]


@pytest.mark.parametrize("options", SAVED)
def test_what_is_saved_is_read_by_both(tmp_path: Path, options: dict[str, Any]) -> None:
    saved = GenerationConfig(**options)
    path = directory(tmp_path, IDS, None)
    saved.save_pretrained(path)
    assert GenerationConfig.from_pretrained(path) == saved
    assert_same(saved, published(path))
    written = json.loads((path / "generation_config.json").read_text())
    assert set(written) == set(IDS) | set(options)
    assert not isinstance(written.get("repetition_penalty"), int)


def test_what_belongs_to_a_call_is_not_saved(tmp_path: Path) -> None:
    path = directory(tmp_path, IDS, None)
    GenerationConfig(
        output_scores=True, text_of=str, prefix_allowed_tokens_fn=lambda _batch_id, _ids: [2]
    ).save_pretrained(path)
    assert GenerationConfig.from_pretrained(path) == GenerationConfig()
    # A published file may ask for scores, and gets them of no program unless the call asks, too.
    path = directory(tmp_path, IDS, {"output_scores": True})
    assert GenerationConfig.from_pretrained(path) == GenerationConfig()
