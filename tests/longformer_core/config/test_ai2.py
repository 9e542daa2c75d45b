"""The original release in its own names against the published implementation of the same weights.

The directories are made of published models, renamed backwards: same weights, same numbers.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from longformer_core.checkpoints.ai2 import published_weights
from longformer_core.checkpoints.directory import check_directory
from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.config.ai2 import published_config
from longformer_core.errors import CheckpointError, ConfigError
from longformer_core.layout import Layout
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.models.longformer import LongformerForMaskedLM, LongformerForQuestionAnswering
from tests.helpers import TINY, trained_tokenizer_directory
from tests.longformer_core.models.test_longformer import CONFIG, batch, difference, with_separators

LED = TINY | {
    "vocab_size": 2100,
    "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 32,
}
ORIGINAL: dict[str, Any] = {
    "attention_mode": "sliding_chunks",
    "attention_dilation": [1, 1],
    "autoregressive": False,
    "attention_window": [4, 8],
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


def renamed(weights: dict[str, Tensor], renames: dict[str, str]) -> dict[str, Tensor]:
    """Names whose start is in `renames` get the other start; the order of `renames` counts."""
    out = {}
    for name, tensor in weights.items():
        start = next(old for old in renames if name.startswith(old))
        out[renames[start] + name.removeprefix(start)] = tensor.clone()
    return out


def write(folder: Path, config: dict[str, Any], weights: Any, file: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / file)
    return folder


def longformer_config(**options: Any) -> dict[str, Any]:
    window = {"attention_window": [4, 8, 2], "attention_dilation": [1, 1, 1]}
    return {**CONFIG, **ORIGINAL, **window, "model_type": "roberta", **options}


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "training checkpoint"])
@pytest.mark.parametrize("mode", ["sliding_chunks", "sliding_chunks2", "tvm"])
def test_a_masked_lm(tmp_path: Path, mode: str, wrapped: bool) -> None:
    torch.manual_seed(0)
    published = transformers.LongformerForMaskedLM(transformers.LongformerConfig(**CONFIG)).eval()
    weights = renamed(published.state_dict(), {"longformer.": "roberta.", "": ""})
    weights["roberta.pooler.dense.weight"] = torch.ones(32, 32)
    if wrapped:
        weights = {
            "epoch": 3,
            "hparams": Namespace(seed=1),
            "state_dict": renamed(weights, {"": "model."}),
        }
    file = "epoch=3.ckpt" if wrapped else "pytorch_model.bin"
    folder = write(tmp_path, longformer_config(attention_mode=mode), weights, file)
    ours = LongformerForMaskedLM.from_pretrained(folder)
    assert ours.config.attention_window == CONFIG["attention_window"] == [8, 16, 4]
    inputs = batch()
    with torch.no_grad():
        expected, got = published(**inputs).logits, ours(**inputs).logits
    assert difference(got, expected) <= 1e-5


def test_a_question_answering_model_beside_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LongformerConfig(**CONFIG)
    published = transformers.LongformerForQuestionAnswering(config).eval()
    weights = renamed(published.state_dict(), {"longformer.": "model.", "": ""})
    assert "model.embeddings.word_embeddings.weight" in weights
    weights["model.pooler.dense.bias"] = torch.ones(32)
    content = {"state_dict": weights, "optimizer_states": [{"state": {}}]}
    folder = write(tmp_path, longformer_config(), content, "last.ckpt")
    ours = LongformerForQuestionAnswering.from_pretrained(folder)
    inputs = with_separators(batch())
    with torch.no_grad():
        expected, got = published(**inputs), ours(**inputs)
    assert difference(got.start_logits, expected.start_logits) <= 1e-5
    assert difference(got.end_logits, expected.end_logits) <= 1e-5


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "training checkpoint"])
def test_an_led_loses_the_two_rows_that_no_token_uses(tmp_path: Path, wrapped: bool) -> None:
    torch.manual_seed(0)
    published = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**LED)).eval()
    weights = renamed(published.state_dict(), {"led.": "model.", "": ""})
    del weights["lm_head.weight"]  # tied by the code of the time
    for side in ("encoder", "decoder"):
        name = f"model.{side}.embed_positions.weight"
        weights[name] = torch.cat([torch.full((2, 32), 99.0), weights[name]])
    if wrapped:
        weights = {"state_dict": renamed(weights, {"": "model."})}
    config = {**LED, **ORIGINAL, "model_type": "bart", "max_position_embeddings": 1024}
    config |= {"normalize_embedding": True, "scale_embedding": False, "num_hidden_layers": 2}
    folder = write(tmp_path, config, weights, "pytorch_model.bin")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((trained_tokenizer_directory() / name).read_bytes())
    assert check_directory(folder) == []
    ours = LEDForConditionalGeneration.from_pretrained(folder)
    assert ours.config.attention_window == [8, 16]
    assert "max_position_embeddings" not in ours.config.extra
    theirs = published.state_dict()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs[name]), name
    ids = torch.randint(4, 2100, (1, 50))
    with torch.no_grad():
        expected = published.led.encoder(ids, torch.ones_like(ids)).last_hidden_state[0]
        got = ours.encode(ids[0], Layout.from_lengths([50]))
    assert difference(got, expected) <= 1e-5
    ours.save_pretrained(tmp_path / "published")
    again, told = transformers.LEDForConditionalGeneration.from_pretrained(
        tmp_path / "published", output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.attention_window == [8, 16]
    assert torch.equal(
        again.led.decoder.embed_positions.weight, theirs["led.decoder.embed_positions.weight"]
    )


def test_what_was_read_is_written_as_published(tmp_path: Path) -> None:
    config = LongformerConfig.from_dict(longformer_config())
    assert config.radii == (4, 8, 2)
    config.save_pretrained(tmp_path)
    assert LongformerConfig.from_pretrained(tmp_path).radii == (4, 8, 2)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {"attention_mode", "attention_dilation", "autoregressive"}.isdisjoint(written)
    assert written["model_type"] == "longformer"
    assert transformers.LongformerConfig.from_pretrained(tmp_path).attention_window == [8, 16, 4]


def test_published_files_that_remember_the_mode_keep_their_windows() -> None:
    values = {**CONFIG, "model_type": "longformer", "attention_mode": "longformer"}
    assert LongformerConfig.from_dict(values).radii == (4, 8, 2)
    assert published_config(values, "longformer") == values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_mode": "n2"}, "'n2' of config.json means dense attention"),
        ({"attention_mode": "sliding_chunks_no_overlap"}, "whole neighbouring chunks"),
        ({"attention_mode": "sliding_chunks3"}, "whole neighbouring chunks"),
        ({"attention_dilation": [1, 2, 1]}, r"attention_dilation is \[1, 2, 1\]"),
        ({"attention_dilation": 2}, "attention_dilation is 2"),
        ({"autoregressive": True}, "autoregressive is True"),
        ({"pad_token_id": 0}, "pad_token_id is 0; only 1 can be read"),
        ({"attention_window": None}, "attention_window is None"),
        ({"attention_window": [4, "8", 2]}, "tokens on one side"),
        ({"model_type": "longformer"}, "remove from config.json the one"),
        ({"model_type": "bart"}, "type 'bart'; of the original release only 'roberta'"),
    ],
)
def test_what_no_published_model_does_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LongformerConfig.from_dict(longformer_config(**change))


@pytest.mark.parametrize("name", ["scale_embedding", "normalize_before", "add_final_layer_norm"])
def test_variants_of_bart_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is True; only False"):
        LEDConfig.from_dict({**LED, **ORIGINAL, name: True})


def test_one_number_serves_all_layers() -> None:
    values = longformer_config(attention_window=4, attention_dilation=1)
    del values["model_type"]
    assert LongformerConfig.from_dict(values).attention_window == 8


def test_published_names_are_left_alone() -> None:
    weights = {"led.encoder.embed_positions.weight": torch.ones(5, 2), "lm_head.weight": Tensor()}
    assert published_weights(weights, "led") == weights
    inside = {f"model.{name}": tensor for name, tensor in weights.items()}
    unwrapped = published_weights(inside, "led")
    assert unwrapped.keys() == weights.keys()
    assert unwrapped["led.encoder.embed_positions.weight"].shape == (5, 2)


def test_training_checkpoints_must_be_one_and_hold_plain_data(tmp_path: Path) -> None:
    write(tmp_path, longformer_config(), {"state_dict": {"x": torch.ones(1)}}, "a.ckpt")
    write(tmp_path, longformer_config(), {"state_dict": {"x": torch.ones(1)}}, "b.ckpt")
    with pytest.raises(CheckpointError, match=r"single training checkpoint \*\.ckpt"):
        LongformerForMaskedLM.from_pretrained(tmp_path)
    (tmp_path / "b.ckpt").unlink()
    torch.save({"state_dict": {}, "callbacks": {Path: 1}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="plain tensors"):
        LongformerForMaskedLM.from_pretrained(tmp_path)
