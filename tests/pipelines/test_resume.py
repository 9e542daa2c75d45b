"""Killed at any instant and started again, a run ends with the same rows, once each."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from pipelines.errors import Refused
from tests.helpers import corpus_texts
from tests.pipelines.drive import drive

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS, BLOCK = 240, 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real texts, a few hundred words each, over four files."""
    folder = tmp_path_factory.mktemp("corpus")
    words = " ".join(corpus_texts(12)).split()
    texts = [" ".join(words[150 * i : 150 * i + 60 + i]) for i in range(NUM_ROWS)]
    for part in range(4):
        rows = texts[part::4]
        ids = [f"{part}-{i}" for i in range(len(rows))]
        pq.write_table(pa.table({"id": ids, "text": rows}), folder / f"{part}.parquet")
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    ray_session: None, corpus: Path, led_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The summaries of a run that nothing happened to. Distinct, or no comparison could see."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    drive(corpus=str(corpus), output=str(output), model=str(led_directory))
    rows = summaries(output)
    assert len(rows) == NUM_ROWS
    assert len(set(rows.values())) > 0.9 * NUM_ROWS
    return rows


def summaries(output: Path) -> dict[str, str]:
    manifest = json.loads((output / "_manifest.json").read_text())
    assert (output / "_SUCCESS").exists()
    table = pads.dataset([str(output / f["path"]) for f in manifest["files"]]).to_table()
    ids = table["id"].to_pylist()
    assert len(ids) == len(set(ids)), "a row is there twice"
    return dict(zip(ids, table["summary"].to_pylist(), strict=True))


def begun(journal: Path) -> Counter[str]:
    return Counter(line for log in journal.glob("*.log") for line in log.read_text().splitlines())


def num_committed(output: Path) -> int:
    names = [p.name for p in (output / "_checkpoint").glob("*.parquet")]
    return sum(not n.endswith(".pending.parquet") for n in names)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)


class Driver:
    """A driver process and everything it started."""

    def __init__(self, log: Path, **arguments: Any) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        environment.pop("RAY_ADDRESS", None)
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.pipelines.drive", json.dumps(arguments)],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
            )
        self.log = log

    def kill(self) -> None:
        """SIGKILL to the driver; what it leaves behind is ended by id."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(children, timeout=5.0)
        for child in alive:
            child.kill()

    def wait(self) -> int:
        return self.process.wait(timeout=240.0)


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path, Path]:
    journal = tmp_path / "journal"
    journal.mkdir()
    return tmp_path / "run", journal, tmp_path / "log.txt"


def test_killed_three_times_then_started_twice_at_once(
    place: tuple[Path, Path, Path],
    corpus: Path,
    led_directory: Path,
    undisturbed: dict[str, str],
) -> None:
    output, journal, log = place
    arguments: dict[str, Any] = {
        "corpus": str(corpus),
        "output": str(output),
        "model": str(led_directory),
        "task": {"journal": str(journal), "slow_s": 0.02},
    }
    blocks = NUM_ROWS // BLOCK
    for share in (0.3, 0.6, 0.9):
        driver = Driver(log, **arguments)
        wait_for(
            lambda share=share, driver=driver: (
                num_committed(output) >= share * blocks or driver.process.poll() is not None
            ),
            f"{share:.0%} of the blocks",
        )
        assert driver.process.poll() is None, log.read_text()[-3000:]
        driver.kill()
        assert not (output / "_SUCCESS").exists()
    # Other settings are refused, and named; what cannot change a row may change.
    with pytest.raises(Refused, match=r"max_new_tokens was 8, is 9"):
        drive(**arguments | {"generation": {"max_new_tokens": 9}})
    arguments["task"] |= {"batch_tokens": 4096}
    rivals = [Driver(log, max_errors="5%", **arguments) for _ in range(2)]
    assert sorted(rival.wait() for rival in rivals) == [0, 2], log.read_text()[-3000:]
    assert "is working on this run directory" in log.read_text()
    assert summaries(output) == undisturbed
    again = begun(journal).total() - NUM_ROWS
    assert 0 <= again <= 3 * 4 * BLOCK, f"{again} rows were worked on again"
    assert "a kill undoes at most 4 blocks of work" in log.read_text()


def test_killed_on_two_cpus_with_a_limit(
    place: tuple[Path, Path, Path],
    corpus: Path,
    led_directory: Path,
    undisturbed: dict[str, str],
) -> None:
    output, journal, log = place
    limit = 150
    arguments: dict[str, Any] = {
        "corpus": str(corpus),
        "output": str(output),
        "model": str(led_directory),
        "limit": limit,
        "num_cpus": 2,
        "task": {"journal": str(journal), "slow_s": 0.02},
    }
    driver = Driver(log, **arguments)
    wait_for(lambda: num_committed(output) >= 3, "the third block")
    worked_on = begun(journal).total()
    assert worked_on <= (num_committed(output) + 4) * BLOCK, "finished rows are not durable"
    driver.kill()
    assert Driver(log, **arguments).wait() == 0, log.read_text()[-3000:]
    rows = summaries(output)
    assert len(rows) == limit
    assert rows.items() <= undisturbed.items()
    with pytest.raises(Refused, match="input"):
        drive(**{k: v for k, v in arguments.items() if k not in ("limit", "num_cpus")})


def test_a_killed_worker_loses_nothing(
    place: tuple[Path, Path, Path],
    corpus: Path,
    led_directory: Path,
    undisturbed: dict[str, str],
) -> None:
    output, journal, _ = place
    killed: list[int] = []

    def kill_worker() -> None:
        wait_for(lambda: num_committed(output) >= 3, "the third block")
        killed.append(int(next(journal.glob("*.log")).stem))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_worker)
    killer.start()
    drive(
        corpus=str(corpus),
        output=str(output),
        model=str(led_directory),
        task={"journal": str(journal), "slow_s": 0.02},
    )
    killer.join()
    assert killed
    assert len(list(journal.glob("*.log"))) == 2, "no second worker took over"
    assert summaries(output) == undisturbed
