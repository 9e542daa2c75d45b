"""`longhaul convert`: what it prints, writes and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from jobs.cli import longhaul
from jobs.options import exit_code
from longformer_core.models.longformer import LongformerForMaskedLM

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 18,
}


def job(*flags: Any) -> int:
    arguments = ["convert", *map(str, flags)]
    return exit_code(lambda: longhaul.main(arguments, standalone_mode=False))


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """Everything printed since the last look, in one line: tables fold long cells."""
    out, err = capsys.readouterr()
    return " ".join((out + err).replace("│", " ").split())


@pytest.fixture
def short(tmp_path: Path) -> Path:
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES))
    model.save_pretrained(tmp_path / "short")
    return tmp_path / "short"


def test_a_directory_comes_out(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", short, "--output", tmp_path / "long", "--max-length", 64]
    assert job(*flags, "--attention-window", 8, "--dry-run") == 0
    plan = told(capsys)
    assert "nothing was written" in plan
    assert "RobertaForMaskedLM, 16 positions" in plan
    assert "LongformerForMaskedLM, 64 positions" in plan
    assert "16 positions are repeated up to 64" in plan
    assert "up to 5 tokens are answered as by the original" in plan
    assert not (tmp_path / "long").exists()
    assert job(*flags, "--attention-window", 8) == 0
    assert "loads completely" in told(capsys)
    model = LongformerForMaskedLM.from_pretrained(tmp_path / "long")
    assert (model.config.max_length, model.config.radii) == (64, (4,))
    assert job(*flags) == 2
    assert "is not an empty directory; choose a new one" in told(capsys)


def test_every_problem_is_told(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"model_type": "mbart"}))
    assert job("--model", short, "--output", short) == 2
    words = told(capsys)
    assert "model_type 'mbart' cannot be converted" in words
    assert "not an empty directory" in words


def test_damaged_weights_are_told(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(short / "model.safetensors")
    weights["lm_head.dense.bias"][0] = float("inf")
    save_file(weights, short / "model.safetensors")
    assert job("--model", short, "--output", tmp_path / "long") == 2
    assert "not all numbers are finite, in lm_head.dense.bias" in told(capsys)
    assert not (tmp_path / "long").exists()
