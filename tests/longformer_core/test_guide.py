"""The guide's code runs as it stands, from top to bottom."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from longformer_core import LongformerConfig, LongformerForMaskedLM, LongformerTokenizer
from tests.helpers import tokenizer_directory

GUIDE = Path(__file__).parents[2] / "longformer_core" / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def directories(tmp_path: Path, led_directory: Path) -> Path:
    """Return a folder with the model directories that the guide speaks of, tiny ones."""
    torch.manual_seed(0)
    tokenizer = LongformerTokenizer.from_pretrained(tokenizer_directory())
    size: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 66,
    }
    LongformerForMaskedLM(LongformerConfig(**size, attention_window=8)).save_pretrained(
        tmp_path / "longformer"
    )
    config = transformers.RobertaConfig(**size, type_vocab_size=1, layer_norm_eps=1e-5)
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    for name in ("longformer", "roberta"):
        tokenizer.save_pretrained(tmp_path / name)
    shutil.copytree(led_directory, tmp_path / "led")
    return tmp_path


def test_the_guide_runs(
    directories: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(directories)
    code = BLOCK.findall(GUIDE.read_text(encoding="utf-8"))
    assert len(code) == 11
    names: dict[str, Any] = {}
    for block in code:
        exec(compile(block, str(GUIDE), "exec"), names)
    printed = capsys.readouterr().out
    assert "torch.Size([2, " in printed
    assert "Estimate(weights_bytes=" in printed
    assert names["loss"] > 0
    transformers.LEDForConditionalGeneration.from_pretrained(directories / "tuned")
    transformers.LongformerForMaskedLM.from_pretrained(directories / "long-roberta")
