"""The pooling files of sentence-transformers, older and newer, and those that have no match."""

import json
from pathlib import Path
from typing import Any

import pytest

from longformer_core.checkpoints.pooling import Pooling, read_pooling
from longformer_core.errors import CheckpointError

OLD_FLAGS = {
    "word_embedding_dimension": 384,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
}


def write(path: Path, pooling: Any, *kinds: str, limits: dict[str, Any] | None = None) -> Path:
    names = ("Transformer", "Pooling", *kinds)
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{name}" if index else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for index, name in enumerate(names)
    ]
    (path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    if limits is not None:
        (path / "sentence_bert_config.json").write_text(json.dumps(limits), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("flag", "mode"),
    [
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_max_tokens", "max"),
    ],
)
def test_modes_of_older_and_newer_releases(tmp_path: Path, flag: str, mode: str) -> None:
    old = write(tmp_path, {**OLD_FLAGS, flag: True}, "Normalize", limits={"max_seq_length": 256})
    assert read_pooling(old) == Pooling(mode, True, 256, False)  # type: ignore[arg-type]
    new = write(tmp_path, {"pooling_mode": mode}, limits={"do_lower_case": True})
    assert read_pooling(new) == Pooling(mode, False, None, True)  # type: ignore[arg-type]


def test_a_directory_without_them_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "sentence_bert_config.json").write_text("{}", encoding="utf-8")
    assert read_pooling(tmp_path) is None


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        (OLD_FLAGS, "pools by nothing"),
        ({**OLD_FLAGS, "pooling_mode_mean_sqrt_len_tokens": True}, "by mean_sqrt_len_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "by mean, cls"),
        ({"pooling_mode": ["max", "mean"]}, "by max, mean; what can be computed is one of mean"),
        ([], "is damaged"),
    ],
)
def test_poolings_without_a_match_are_refused(tmp_path: Path, pooling: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_pooling(write(tmp_path, pooling))


def test_modules_without_a_match_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names Transformer, Pooling, Dense;"):
        read_pooling(write(tmp_path, {"pooling_mode": "mean"}, "Dense"))
    for text in ("{", '{"a": 1}', "[]", "[1]"):
        (tmp_path / "modules.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"damaged|no module"):
            read_pooling(tmp_path)
