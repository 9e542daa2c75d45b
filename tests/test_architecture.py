"""Imports run one way; the table here is the design, read from the sources by their syntax."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("longformer_core", "pipelines", "jobs")

# Inside the core a file may import files of a lower or, within one folder, of its own rank.
RANKS = {
    "cpu": 0,
    "errors": 0,
    "kernels": 0,  # C++
    "operators": 0,
    "ai2": 1,
    "batch_encoding": 1,
    "products": 1,
    "skeleton": 1,
    "chunks": 2,
    "config": 2,
    "few_rows": 2,
    "many_rows": 2,
    "dropout": 3,
    "families": 3,
    "h5": 3,
    "layout": 3,
    "linear": 3,
    "location": 3,
    "attention": 4,
    "vocabulary": 4,
    "tokenizer": 5,
    "checkpoint": 6,
    "global_tokens": 6,
    "memory": 6,
    "threads": 6,
    "generation": 7,
    "models": 8,
    "convert": 9,
    "estimate": 9,
    "__init__": 10,
}
# What each package may not import at all, at any depth.
FORBIDDEN = {
    "longformer_core": {"ray", "click", "pipelines", "jobs", "transformers", "tests"},
    "pipelines": {"jobs", "transformers", "tests", "click"},
    "jobs": {"transformers", "tests"},
}
# They are imported where they are used, so that everything else runs without Triton.
KERNELS = {"longformer_core.attention.fused", "longformer_core.attention.fused_rows"}
# Beside tests: the dispatch, and the explicit matrices that nobody computes with.
ORACLE_READERS = {"longformer_core.attention.window", "longformer_core.attention.dense"}
GRAPHS = {"pipelines.batch", "pipelines.train", "pipelines.serve"}


def sources() -> list[Path]:
    return sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Yield the dotted name of everything that is imported, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, base] if base else parent)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """Return what one file imports against the table."""
    package, *rest = module.split(".")
    found = []
    for name in imports(ast.parse(source), module):
        top, *inner = name.split(".")
        if top in FORBIDDEN[package]:
            found.append(f"{module} imports {name}: not allowed in {package}")
        if top == "triton" and module not in KERNELS:
            found.append(f"{module} imports {name}: only the files of kernels may")
        if name.startswith("longformer_core.attention.reference") and (
            module not in ORACLE_READERS
        ):
            found.append(f"{module} imports {name}: the oracle serves tests, dispatch and plots")
        graph = ".".join(name.split(".")[:2])
        if package == "pipelines" and graph in GRAPHS and graph != module:
            found.append(f"{module} imports {name}: no pipeline file builds on a graph")
        if package == top == "longformer_core" and inner and not _allowed(rest, inner):
            found.append(f"{module} imports {name}: imports run upwards only")
    return found


def _allowed(importer: list[str], imported: list[str]) -> bool:
    above, below = RANKS[importer[0]], RANKS[imported[0]]
    return below < above or (below == above and importer[0] == imported[0])


def test_every_file_of_the_core_has_a_rank() -> None:
    paths = [p for p in (ROOT / "longformer_core").iterdir() if p.is_dir() or p.suffix == ".py"]
    assert {p.stem for p in paths} - {"__pycache__"} <= set(RANKS)


@pytest.mark.parametrize("file", sources(), ids=module_name)
def test_imports_follow_the_table(file: Path) -> None:
    assert violations(module_name(file), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longformer_core.config", "import ray"),
        ("longformer_core.config", "def f():\n    from pipelines.runs import x"),
        ("longformer_core.models.led", "import transformers.models.led"),
        ("longformer_core.models.led", "import triton.language as tl"),
        ("longformer_core.attention.blocked", "from longformer_core.attention import reference"),
        ("longformer_core.attention.blocked", "from .reference import window_attention"),
        ("longformer_core.config", "from longformer_core.layout import Layout"),
        ("longformer_core.layout", "from longformer_core import attention"),
        ("longformer_core.generation.engine", "from longformer_core.models.led import LEDModel"),
        ("longformer_core.layout", "from longformer_core.tokenizer import LEDTokenizer"),
        ("pipelines.batch", "from jobs.cli import main"),
        ("pipelines.serve", "from pipelines.batch import run"),
        ("pipelines.corpus", "from pipelines import batch"),
        ("jobs.summarize", "from tests.helpers import corpus_texts"),
    ],
)
def test_the_table_catches(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longformer_core.attention.fused", "import triton"),
        ("longformer_core.attention.window", "from longformer_core.attention import reference"),
        ("longformer_core.models.led", "from longformer_core.models.base import Model"),
        ("longformer_core.tokenizer", "def f():\n    import pyarrow as pa"),
        ("pipelines.batch", "from pipelines.runs import Run"),
        ("jobs.summarize", "from pipelines.batch import run"),
    ],
)
def test_the_table_lets_pass(module: str, source: str) -> None:
    assert violations(module, source) == []
