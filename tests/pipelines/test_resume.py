"""Killed at any instant and started again, a run ends with the same rows, once each."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import Refused
from tests.pipelines.drive import drive
from tests.pipelines.driving import Driver, begun, num_committed, summaries, wait_for

BLOCK = 8


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
    num_rows = len(undisturbed)
    blocks = num_rows // BLOCK
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
    with pytest.raises(Refused, match=r"max_new_tokens was 16, is 9"):
        drive(**arguments | {"generation": {"max_new_tokens": 9}})
    arguments["task"] |= {"batch_tokens": 4096}
    rivals = [Driver(log, max_errors="5%", **arguments) for _ in range(2)]
    assert sorted(rival.wait() for rival in rivals) == [0, 2], log.read_text()[-3000:]
    assert "is working on this run directory" in log.read_text()
    assert summaries(output) == undisturbed
    again = begun(journal).total() - num_rows
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


def test_a_lost_node_loses_nothing(
    place: tuple[Path, Path, Path],
    corpus: Path,
    led_directory: Path,
    undisturbed: dict[str, str],
) -> None:
    output, journal, log = place
    driver = Driver(
        log,
        module="tests.pipelines.drive_two_nodes",
        corpus=str(corpus),
        output=str(output),
        model=str(led_directory),
        num_workers=2,
        stall_timeout_s=180.0,
        task={"journal": str(journal), "slow_s": 0.05},
    )
    assert driver.wait() == 0, log.read_text()[-3000:]
    assert "a node was removed" in log.read_text()
    assert summaries(output) == undisturbed
    assert begun(journal).total() > len(undisturbed), "the node held no work: nothing was tested"
