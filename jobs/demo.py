"""Try Longhaul with nothing at hand: `make demo`, or `longhaul demo`.

The corpus is the documentation of the Python that runs this, the model is untrained, and the job
is the real one: `longhaul summarize`.
"""

import ast
import itertools
import json
import logging
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from jobs.options import run
from jobs.summarize import summarize
from longformer_core.config import LEDConfig
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.tokenization.tokenizer import LEDTokenizer
from pipelines.run_directory.directory import read_manifest
from pipelines.storage import locate

logger = logging.getLogger(__name__)

_NO_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# A module with less text than this is told in its package's document, not in one of its own.
_SMALL_CHARS = 5000
_NUM_SHARDS = 4
_VOCAB_SIZE = 4096
_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
_SHOWN_ROWS, _SHOWN_CHARS = 6, 40

# Documents this long are cut at the encoder's positions, and the output says so.
_MODEL: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "attention_window": 256,
    "max_encoder_position_embeddings": 16384,
    "max_decoder_position_embeddings": 128,
    # At the usual 0.02 an untrained model hardly looks at its source, and all rows are alike.
    "init_std": 0.3,
}
_GENERATION = {
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "num_beams": 2,
    "max_length": 25,
    "no_repeat_ngram_size": 3,
}


@click.command(name="demo")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where corpus, model and run go, and stay. Default: a new temporary directory.",
)
@click.option("--rows", type=click.IntRange(min=1), help="Only the first N documents.")
def demo(directory: Path | None, rows: int | None) -> None:
    """Summarize the documentation of this Python with a small untrained model.

    Run again with the same --directory, it goes on where it stopped, or shows the result again.
    """
    directory = (directory or Path(tempfile.mkdtemp(prefix="longhaul-demo-"))).absolute()
    _open(directory, rows)
    corpus, model, output = (directory / name for name in ("corpus", "model", "run"))
    make_whole(corpus, lambda part: write_corpus(part, rows))
    make_whole(model, lambda part: write_model(part, _texts(corpus)))
    print(f"The demo's corpus, model and run are in {directory}")
    print("The model is small and untrained: its summaries are noise, everything else is real.")
    arguments = ["--input", str(corpus), "--keep-columns", "package"]
    arguments += ["--model", str(model), "--output", str(output)]
    print(f"\n$ longhaul summarize {shlex.join(arguments)}\n", flush=True)
    # These are paths of this machine, so a cluster that the shell names is left alone.
    os.environ.pop("RAY_ADDRESS", None)
    summarize.main(arguments, prog_name="longhaul summarize", standalone_mode=False)
    _show_rows(output)


def _open(directory: Path, rows: int | None) -> None:
    """Take a directory that is empty or holds this demo.

    Raises: click.UsageError for anything else.
    """
    marker = directory / "demo.json"
    if marker.exists():
        before = json.loads(marker.read_text(encoding="utf-8"))["rows"]
        if before != rows:
            was = "without --rows" if before is None else f"with --rows {before}"
            raise click.UsageError(
                f"{directory} holds a demo made {was}; say the same, or choose another --directory"
            )
        return
    if directory.exists() and any(directory.iterdir()):
        raise click.UsageError(f"{directory} is not empty and holds no demo; choose another")
    directory.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"rows": rows}) + "\n", encoding="utf-8")


def make_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Write a directory whole or not at all; leave one that stands: a run depends on it."""
    if target.exists():
        return
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write(part)
    part.rename(target)


# --- the corpus -------------------------------------------------------------------------------


def write_corpus(directory: Path, rows: int | None = None) -> None:
    """Write the documentation of the standard library as Parquet shards: id, text, package.

    Raises: click.UsageError if this Python came without its library's sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    documents = list(itertools.islice(library_documents(library), rows))
    if not documents:
        raise click.UsageError(
            f"{library} holds no Python sources to make a corpus of; use another Python, or bring "
            "a corpus and a model of your own: longhaul summarize --help"
        )
    names, texts = zip(*documents, strict=True)
    packages = [name.partition(".")[0] for name in names]
    table = pa.table({"id": names, "text": texts, "package": packages})
    size = -(-len(documents) // _NUM_SHARDS)
    for shard, start in enumerate(range(0, len(documents), size)):
        pq.write_table(table.slice(start, size), directory / f"library-{shard}.parquet")


def library_documents(library: Path) -> Iterator[tuple[str, str]]:
    """Yield dotted name and text of every module and package that says something."""
    for path in sorted(library.iterdir()):
        if path.stem in _NO_DOCUMENTATION:
            continue
        if path.suffix == ".py":
            found = [(path.stem, module_text(path, path.stem))]
        elif (path / "__init__.py").exists():
            found = package_documents(path, path.name)
        else:
            continue
        yield from ((name, text) for name, text in found if text)


def package_documents(package: Path, name: str) -> list[tuple[str, str]]:
    """Return the large modules of a package, and last the package with its small ones."""
    documents = []
    own = [module_text(package / "__init__.py", name)]
    for path in sorted(package.iterdir()):
        inner = f"{name}.{path.stem}"
        if path.stem in _NO_DOCUMENTATION or path.name == "__init__.py":
            continue
        if path.suffix == ".py":
            text = module_text(path, inner)
        elif (path / "__init__.py").exists():
            *large, (_, text) = package_documents(path, inner)
            documents += large
        else:
            continue
        if len(text) < _SMALL_CHARS:
            own.append(text)
        else:
            documents.append((inner, text))
    return [*documents, (name, "\n\n".join(text for text in own if text))]


def module_text(path: Path, name: str) -> str:
    """Return the docstrings and signatures of a module, read and not imported; "" for none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the style of a source that is not ours
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, SyntaxError) as error:  # some Pythons carry sources broken on purpose
        logger.info("%s is left out: %s", path, error)
        return ""
    parts = list(_describe(tree, ""))
    return "\n\n".join([name, *parts]) if parts else ""


def _describe(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    """Yield docstrings, and signatures of what is defined in a module or class."""
    yield from _docstring(node)
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in child.bases)
            yield f"class {prefix}{child.name}({bases})"
            yield from _describe(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"def {prefix}{child.name}({ast.unparse(child.args)})"
            yield from _docstring(child)


def _docstring(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> list[str]:
    text = ast.get_docstring(node)
    return [text] if text else []


# --- the model --------------------------------------------------------------------------------


def write_model(directory: Path, texts: list[str]) -> None:
    """Write a seeded untrained LED in the published layout, with a vocabulary of these texts."""
    train_vocabulary(directory, texts)
    tokenizer = LEDTokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(directory)
    config = LEDConfig(vocab_size=len(tokenizer), **_MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LEDForConditionalGeneration(config).save_pretrained(directory)
    text = json.dumps(_GENERATION, indent=2) + "\n"
    (directory / "generation_config.json").write_text(text, encoding="utf-8")


def train_vocabulary(directory: Path, texts: list[str]) -> None:
    """Train a byte-level BPE and write vocab.json and merges.txt as RoBERTa lays them out."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE - 1,  # <mask> comes last, after all that is learned
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.model.save(str(directory))
    path = directory / "vocab.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))
    vocab["<mask>"] = len(vocab)
    path.write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")


def _texts(corpus: Path) -> list[str]:
    texts: list[str] = pq.read_table(corpus, columns=["text"])["text"].to_pylist()
    return texts


# --- the result -------------------------------------------------------------------------------


def _show_rows(output: Path) -> None:
    """Print a few rows of the result, from the longest document to the shortest."""
    files = read_manifest(locate(str(output))).files
    columns = ["id", "num_tokens_in", "truncated", "summary"]
    rows = pa.concat_tables(pq.read_table(output / f.path, columns=columns) for f in files)
    ordered = rows.sort_by([("num_tokens_in", "descending")]).to_pylist()
    table = Table(title="Some of the rows", title_justify="left")
    table.add_column("id", no_wrap=True)
    table.add_column("tokens in", justify="right", no_wrap=True)
    table.add_column("truncated", no_wrap=True)
    table.add_column("summary begins", overflow="fold")
    last = len(ordered) - 1
    for place in sorted({last * i // (_SHOWN_ROWS - 1) for i in range(_SHOWN_ROWS)}):
        row = ordered[place]
        table.add_row(
            Text(row["id"]),
            f"{row['num_tokens_in']:,}",
            "yes" if row["truncated"] else "no",
            Text(_printable(row["summary"] or "")[:_SHOWN_CHARS]),
        )
    Console().print(table)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).strip()


def main() -> int:
    return run(demo)


if __name__ == "__main__":
    sys.exit(main())
