"""Tokens, ids, roles and files: what is added, what is kept, and what transformers reads of it."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from longformer_core.errors import CheckpointError, TokenizerError
from longformer_core.tokenization.tokenizer import LEDTokenizer, LongformerTokenizer
from tests.helpers import tokenizer_directory


@pytest.fixture
def tokenizer() -> LEDTokenizer:
    return LEDTokenizer.from_pretrained(tokenizer_directory())


def parts(folder: Path, **stored: Any) -> Path:
    """Copy vocab.json and merges.txt, and write the given files as JSON."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(tokenizer_directory() / name, folder / name)
    for name, content in stored.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_tokens_and_ids(tokenizer: LEDTokenizer) -> None:
    ids = tokenizer.encode(" the world")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0], tokens[-1] == ("<s>", "</s>")
    assert tokenizer.convert_tokens_to_ids(tokens) == ids
    assert tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True) == tokens[1:-1]
    assert tokenizer.convert_ids_to_tokens(ids[1]) == tokens[1]
    assert tokenizer.convert_tokens_to_ids("</s>") == 2
    assert tokenizer.convert_tokens_to_ids("no such token") == tokenizer.unk_token_id == 3
    assert tokenizer.convert_ids_to_tokens(10**6) is None
    assert tokenizer.convert_tokens_to_string(tokens[1:-1]) == " the world"
    vocab = tokenizer.get_vocab()
    assert len(vocab) == len(tokenizer) == tokenizer.vocab_size
    assert all(vocab[token] == number for token, number in zip(tokens, ids, strict=True))


def test_special_tokens(tokenizer: LEDTokenizer) -> None:
    names = ["<s>", "</s>", "<unk>", "<pad>", "<mask>"]
    assert tokenizer.all_special_tokens == names
    assert tokenizer.all_special_ids == [0, 2, 3, 1, len(tokenizer) - 1]
    assert tokenizer.special_tokens_map["sep_token"] == tokenizer.sep_token == "</s>"
    assert tokenizer.special_tokens_map["cls_token"] == tokenizer.cls_token == "<s>"
    assert [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id] == [0, 2, 1]
    assert sorted(tokenizer.get_added_vocab()) == sorted(names)
    assert tokenizer.model_max_length > 10**20
    assert bool(tokenizer)


def test_added_tokens_are_whole_tokens_and_are_read_back(
    tokenizer: LEDTokenizer, tmp_path: Path
) -> None:
    before = len(tokenizer)
    assert tokenizer.add_tokens(["longformerish"]) == 1
    assert tokenizer.add_tokens("longformerish") == 0
    assert tokenizer.add_tokens(AddedToken("[ent]", lstrip=True), special_tokens=True) == 1
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["[q]", "[/q]"]}) == 2
    assert tokenizer.vocab_size == before < len(tokenizer)
    text = "a longformerish [q] why [ent] x[/q]"
    ids = tokenizer.encode(text)
    assert len(tokenizer) - 1 in ids
    assert tokenizer.additional_special_tokens == ["[ent]", "[q]", "[/q]"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a longformerish  why x"
    # Limits are set on a copy, which must know the added tokens too.
    assert tokenizer.encode(text, max_length=100) == ids
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "led"}', encoding="utf-8")
    published = AutoTokenizer.from_pretrained(tmp_path)
    assert published(text)["input_ids"] == ids
    assert set(published.all_special_tokens) == set(tokenizer.all_special_tokens)
    assert LEDTokenizer.from_pretrained(tmp_path).encode(text) == ids
    (tmp_path / "tokenizer.json").unlink()
    from_parts = LEDTokenizer.from_pretrained(tmp_path)
    assert from_parts.encode(text) == ids
    assert from_parts.all_special_tokens == tokenizer.all_special_tokens


def test_roles_can_be_given_to_other_tokens(tokenizer: LEDTokenizer, tmp_path: Path) -> None:
    tokenizer.pad_token = "</s>"
    assert tokenizer.pad_token_id == 2
    assert tokenizer.add_special_tokens({"sep_token": "[sep]", "cls_token": "[cls]"}) == 2
    first, second = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert tokenizer.encode("")[:: len(tokenizer.encode("")) - 1] == [first, second]
    tokenizer.save_pretrained(tmp_path)
    again = LEDTokenizer.from_pretrained(tmp_path)
    assert again.encode("a", "b") == tokenizer.encode("a", "b")
    assert [again.pad_token_id, again.sep_token] == [2, "[sep]"]


def test_roles_that_cannot_be(tokenizer: LEDTokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"no pad_token '\[PAD\]'"):
        tokenizer.pad_token = "[PAD]"
    with pytest.raises(AttributeError, match="set pad_token"):
        tokenizer.pad_token_id = 5
    with pytest.raises(TokenizerError, match="did you mean 'mask_token'"):
        tokenizer.add_special_tokens({"msk_token": "x"})
    assert tokenizer.pad_token == "<pad>"


def test_settings_come_from_files_and_from_the_caller(tmp_path: Path) -> None:
    stored = {"model_max_length": 4096, "padding_side": "left", "errors": "replace"}
    parts(tmp_path, tokenizer_config=stored)
    read = LEDTokenizer.from_pretrained(tmp_path)
    assert [read.model_max_length, read.padding_side] == [4096, "left"]
    changed = LEDTokenizer.from_pretrained(tmp_path, model_max_length=16384, add_prefix_space=True)
    assert [changed.model_max_length, changed.padding_side] == [16384, "left"]
    changed.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert [kept["model_max_length"], kept["errors"]] == [16384, "replace"]
    # Now tokenizer.json is read, whose rule of the first space the caller may still change.
    again = LEDTokenizer.from_pretrained(tmp_path)
    assert again.add_prefix_space
    plain = LEDTokenizer.from_pretrained(tmp_path, add_prefix_space=False)
    assert plain.encode("world") == read.encode("world") != again.encode("world")
    with pytest.raises(TokenizerError, match="did you mean 'add_prefix_space'"):
        LEDTokenizer.from_pretrained(tmp_path, add_prefix_spaces=True)


def test_files_of_older_releases(tmp_path: Path) -> None:
    base = len(LEDTokenizer.from_pretrained(tokenizer_directory()))
    parts(
        tmp_path,
        added_tokens={"[ent]": base, "[q]": base + 1},
        special_tokens_map={
            "additional_special_tokens": ["[q]"],
            "mask_token": {"content": "<mask>", "lstrip": True},
        },
    )
    read = LEDTokenizer.from_pretrained(tmp_path)
    assert read.convert_tokens_to_ids(["[ent]", "[q]"]) == [base, base + 1]
    assert read.additional_special_tokens == ["[q]"]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[ent]": base + 7}), encoding="utf-8")
    with pytest.raises(TokenizerError, match=f"the id {base + 7}, and the vocabulary {base}"):
        LEDTokenizer.from_pretrained(tmp_path)


def test_constructed_from_files(tmp_path: Path, tokenizer: LEDTokenizer) -> None:
    vocab, merges = tokenizer.save_vocabulary(tmp_path / "made", filename_prefix="x")
    assert [Path(vocab).name, Path(merges).name] == ["x-vocab.json", "x-merges.txt"]
    tokenizer.save_pretrained(tmp_path)
    for made in (
        LongformerTokenizer(vocab, merges),
        LongformerTokenizer(tokenizer_file=tmp_path / "tokenizer.json", model_max_length=9),
    ):
        assert made.encode("Hello <mask> world") == tokenizer.encode("Hello <mask> world")
    with pytest.raises(TokenizerError, match="give tokenizer_file, or vocab_file and merges_file"):
        LongformerTokenizer(vocab)
    with pytest.raises(TokenizerError, match="did you mean 'model_max_length'"):
        LongformerTokenizer(vocab, merges, max_length=3)
    with pytest.raises(CheckpointError, match="neither a directory"):
        LongformerTokenizer.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("kind", "name"), [(LEDTokenizer, "LEDTokenizer"), (LongformerTokenizer, "LongformerTokenizer")]
)
def test_saved_under_the_published_name(kind: type, name: str, tmp_path: Path) -> None:
    files = kind.from_pretrained(tokenizer_directory()).save_pretrained(tmp_path)
    assert sorted(Path(file).name for file in files) == [
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == name
    assert "extra_special_tokens" not in settings


def test_it_travels_between_processes(tokenizer: LEDTokenizer) -> None:
    tokenizer.add_tokens(["[ent]"])
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("a [ent] b", max_length=4) == tokenizer.encode("a [ent] b", max_length=4)
    assert again.pad_token_id == 1
