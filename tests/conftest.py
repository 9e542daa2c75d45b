"""Fixtures shared by all tests: no network, two threads, one tiny LED, one Ray for the session.

Ray and Arrow are imported by the fixtures that need them: the core's tests do without.
"""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Read when torch is imported. Several processes compute at a time here: threads that wait for one
# another must not keep the cores from them for long.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch

from tests.helpers import corpus_texts, make_led_directory

# Read when huggingface_hub is imported, which no test file has done yet.
os.environ["HF_HUB_OFFLINE"] = "1"
# Two threads, shared out among the processes of pytest-xdist.
torch.set_num_threads(max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

NUM_ROWS = 160


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the pipelines and jobs first.

    pytest-xdist hands out files in this order. Those that run clusters are the longest, and wait
    more than they compute; short files at the end let its processes finish together.
    """
    items.sort(key=lambda item: "longformer_core" in item.path.parts)


@pytest.fixture(scope="session")
def led_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny seeded LED model in the published layout; read it, do not write into it."""
    return make_led_directory(tmp_path_factory.mktemp("led") / "model")


@pytest.fixture(scope="session")
def model_of(
    led_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that says where the small model of a batch task is; do not write there."""
    from tests.pipelines.every_task import CASES
    from tests.pipelines.tasks.heads import make_head

    @functools.cache
    def directory(task: str) -> Path:
        case = CASES[task]
        if case.head is None:
            return led_directory
        path = tmp_path_factory.mktemp(task)
        # A draw that tells rows apart with the published vocabulary and with the fallback.
        make_head(path, case.head, labels=case.labels, seed=7)
        return path

    return directory


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """An embedded cluster; jobs run in this process use it because Ray is initialised."""
    # A RAY_ADDRESS of the developer's shell must not send the tests' rows to his cluster.
    os.environ.pop("RAY_ADDRESS", None)
    root = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    from pipelines.cluster import connect

    with connect(None):
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real texts, a few hundred words each, over four files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("corpus")
    words = " ".join(corpus_texts(30)).split()
    assert len(words) > 150 * NUM_ROWS + 300
    texts = [" ".join(words[150 * i : 150 * i + 60 + i]) for i in range(NUM_ROWS)]
    for part in range(4):
        rows = texts[part::4]
        ids = [f"{part}-{i}" for i in range(len(rows))]
        pq.write_table(pa.table({"id": ids, "text": rows}), folder / f"{part}.parquet")
    return folder


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, led_directory: Path) -> dict[str, str]:
    """The summaries that a run ends with whatever happens to it: those of the engine without Ray.

    Distinct, or no comparison could see.
    """
    import pyarrow.dataset as pads

    from pipelines.batch.worker import Worker
    from tests.pipelines.asking import documents, outputs
    from tests.pipelines.drive import make_task

    table = pads.dataset(str(corpus)).to_table()
    texts = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    task = make_task(str(led_directory))
    worker = Worker(task, "cpu", num_threads=torch.get_num_threads(), memory_share=0.5)
    answers = outputs(worker, documents(task, texts))
    rows = {name: output.columns["summary"] for name, output in answers.items()}
    assert len(rows) == NUM_ROWS
    assert len(set(rows.values())) > 0.9 * NUM_ROWS
    return rows
