"""Killed at any instant and started again, a run ends with the same rows, once each."""

import os
import signal
import threading

import psutil
import pytest

from pipelines.batch.worker_process import KEEP_MEMORY
from pipelines.errors import Refused
from tests.pipelines.driving import Trial, summaries, wait_for

BLOCK = 8


def test_killed_twice_then_started_twice_at_once(trial: Trial, undisturbed: dict[str, str]) -> None:
    num_rows = len(undisturbed)
    for share in (0.3, 0.8):
        driver = trial.start()
        enough = share * num_rows / BLOCK
        wait_for(
            lambda enough=enough, driver=driver: (
                trial.num_committed() >= enough or driver.process.poll() is not None
            ),
            f"{share:.0%} of the blocks",
        )
        assert driver.process.poll() is None, trial.said()
        driver.kill()
        assert not os.path.exists(f"{trial.output}/_SUCCESS")
    # Other settings are refused, and named; what cannot change a row may change.
    with pytest.raises(Refused, match=r"max_new_tokens was 16, is 9"):
        trial.here(generation={"max_new_tokens": 9})
    trial.arguments["task"] |= {"batch_tokens": 4096}
    rivals = [trial.start(max_errors="5%") for _ in range(2)]
    assert sorted(rival.wait() for rival in rivals) == [0, 2], trial.said()
    assert "is working on this run directory" in trial.log.read_text()
    assert summaries(trial.output) == undisturbed
    again = trial.num_begun() - num_rows
    assert 0 <= again <= 2 * 6 * BLOCK, f"{again} rows were worked on again"
    assert "a kill undoes at most 6 blocks of work" in trial.log.read_text()


@pytest.mark.slow
def test_killed_on_two_cpus_with_a_limit(trial: Trial, undisturbed: dict[str, str]) -> None:
    trial.arguments |= {"limit": 120, "num_cpus": 2}
    driver = trial.start()
    wait_for(lambda: trial.num_committed() >= 3, "the third block")
    worked_on = trial.num_begun()
    assert worked_on <= (trial.num_committed() + 6) * BLOCK, "finished rows are not durable"
    worker = psutil.Process(int(next(trial.journal.glob("*.log")).stem))
    assert KEEP_MEMORY.items() <= worker.environ().items(), "the worker has a heap per thread"
    driver.kill()
    assert trial.start().wait() == 0, trial.said()
    rows = summaries(trial.output)
    assert len(rows) == 120
    assert rows.items() <= undisturbed.items()
    with pytest.raises(Refused, match="input"):
        trial.here(limit=None, num_cpus=None)


def test_a_killed_worker_loses_nothing(trial: Trial, undisturbed: dict[str, str]) -> None:
    """No document is to blame for a kill from outside, in whichever of the two blocks it was."""
    killed: list[int] = []
    trial.arguments["task"] |= {"company_s": 5.0}

    def kill_worker() -> None:
        wait_for(lambda: trial.num_committed() >= 3, "the third block")
        killed.append(int(next(trial.journal.glob("*.log")).stem))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_worker)
    killer.start()
    trial.here()
    killer.join()
    assert killed
    assert len(list(trial.journal.glob("*.log"))) == 2, "no second worker took over"
    assert summaries(trial.output) == undisturbed


@pytest.mark.slow
def test_a_lost_node_loses_nothing(trial: Trial, undisturbed: dict[str, str]) -> None:
    trial.arguments["task"] |= {"slow_s": 0.05}
    driver = trial.start("tests.pipelines.drive_two_nodes", num_workers=2, stall_timeout_s=180.0)
    assert driver.wait() == 0, trial.said()
    assert "a node was removed" in trial.log.read_text()
    assert summaries(trial.output) == undisturbed
    assert trial.num_begun() > len(undisturbed), "the node held no work: nothing was tested"
