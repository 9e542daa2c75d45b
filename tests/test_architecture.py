"""Imports run one way; the table here is the design, read from the sources by their syntax."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("longformer_core", "pipelines", "jobs")

# A room imports rooms of a lower number, or its own; rooms of one number do not know each other.
# A room is a folder or a file at the root of its package.
RANKS = {
    "longformer_core": {
        "errors": 0,
        "ops": 0,
        "config": 1,
        "hub": 1,
        "layout": 1,
        "metrics": 1,
        "attention": 2,
        "scheduling": 2,
        "tokenization": 2,
        "checkpoints": 3,
        "encoding": 3,
        "generation": 3,
        "models": 4,
        "conversion": 5,
        "estimate": 5,
        "__init__": 6,
    },
    "pipelines": {
        "__init__": 0,
        "errors": 0,
        "storage": 1,
        "rows": 1,
        "cluster": 2,
        "corpus": 2,
        "run_directory": 2,
        "tasks": 2,
        # A graph each; none imports another.
        "batch": 3,
        "train": 3,
        "serve": 3,
    },
}
# What each package may not import at all, at any depth.
FORBIDDEN = {
    "longformer_core": {"ray", "click", "pipelines", "jobs", "transformers", "tests"},
    "pipelines": {"jobs", "transformers", "tests", "click"},
    "jobs": {"transformers", "tests"},
}
# They are imported where they are used, so that everything else runs without Triton.
KERNELS = "longformer_core.attention.fused."
# Beside tests: the dispatch, and the explicit matrices that nobody computes with.
ORACLE_READERS = {"longformer_core.attention.window", "longformer_core.attention.dense"}
# What one reads at a time.
MOST_LINES_OF_A_FILE = 500
MOST_LINES_OF_A_FUNCTION = 80
# Files at the root of a package, `__init__` left out.
MOST_FILES_AT_THE_ROOT = {"longformer_core": 5, "pipelines": 5}


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
        if top == "triton" and not module.startswith(KERNELS):
            found.append(f"{module} imports {name}: only the files of kernels may")
        if name.startswith("longformer_core.attention.reference") and (
            module not in ORACLE_READERS
        ):
            found.append(f"{module} imports {name}: the oracle serves tests, dispatch and plots")
        if top == package and package in RANKS and inner and not _allowed(package, rest, inner):
            found.append(
                f"{module} imports {name}: imports run one way, from higher to lower rooms"
            )
    return found


def _allowed(package: str, importer: list[str], imported: list[str]) -> bool:
    ranks = RANKS[package]
    above, below = ranks[importer[0]], ranks[imported[0]]
    return below < above or importer[0] == imported[0]


@pytest.mark.parametrize("package", sorted(RANKS))
def test_every_room_has_a_rank(package: str) -> None:
    paths = [p for p in (ROOT / package).iterdir() if p.is_dir() or p.suffix == ".py"]
    assert {p.stem for p in paths} - {"__pycache__"} <= set(RANKS[package])


@pytest.mark.parametrize("file", sources(), ids=module_name)
def test_imports_follow_the_table(file: Path) -> None:
    assert violations(module_name(file), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longformer_core.config.base", "import ray"),
        (
            "longformer_core.config.base",
            "def f():\n    from pipelines.run_directory.directory import x",
        ),
        ("longformer_core.models.led", "import transformers.models.led"),
        ("longformer_core.models.led", "import triton.language as tl"),
        (
            "longformer_core.attention.blocked.attention",
            "from longformer_core.attention import reference",
        ),
        ("longformer_core.attention.blocked.attention", "from ..reference import window_attention"),
        ("longformer_core.config.base", "from longformer_core.layout import Layout"),
        ("longformer_core.layout", "from longformer_core import attention"),
        ("longformer_core.generation.engine", "from longformer_core.models.led import LEDModel"),
        (
            "longformer_core.layout",
            "from longformer_core.tokenization.tokenizer import LEDTokenizer",
        ),
        ("pipelines.batch.driver", "from jobs.cli import main"),
        ("pipelines.serve", "from pipelines.batch.driver import run"),
        ("pipelines.corpus.listing", "from pipelines import batch"),
        ("jobs.summarize", "from tests.helpers import corpus_texts"),
    ],
)
def test_the_table_catches(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longformer_core.attention.fused.window", "import triton"),
        ("longformer_core.attention.window", "from longformer_core.attention import reference"),
        ("longformer_core.models.led", "from longformer_core.models.pretrained import Model"),
        ("longformer_core.tokenization.tokenizer", "def f():\n    import pyarrow as pa"),
        ("pipelines.batch.driver", "from pipelines.run_directory.directory import Run"),
        ("jobs.summarize", "from pipelines.batch.driver import run"),
    ],
)
def test_the_table_lets_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


@pytest.mark.parametrize(
    "file", sorted((ROOT / "pipelines" / "tasks").glob("*.py")), ids=lambda file: file.stem
)
def test_a_task_is_imported_without_a_graph_and_without_torch(file: Path) -> None:
    """A process that only prepares starts in a moment, and every graph can use every task."""
    name = module_name(file).removesuffix(".__init__")
    program = f"import sys, {name}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    loaded = run.stdout.split()
    assert name in loaded
    heavy = ("torch", "ray", "pipelines.batch", "pipelines.train", "pipelines.serve")
    assert [n for n in loaded if any(n == h or n.startswith(h + ".") for h in heavy)] == []


@pytest.mark.parametrize("file", sources(), ids=module_name)
def test_files_and_functions_stay_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    lengths = {
        node.name: (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: n for name, n in lengths.items() if n > MOST_LINES_OF_A_FUNCTION} == {}


@pytest.mark.parametrize("package", sorted(MOST_FILES_AT_THE_ROOT))
def test_few_files_lie_at_the_root(package: str) -> None:
    files = {file.name for file in (ROOT / package).glob("*.py")} - {"__init__.py"}
    assert len(files) <= MOST_FILES_AT_THE_ROOT[package], files
