"""The batch graph: what it takes of a cluster, and workers that run several blocks at once."""

from typing import Any

import pytest

from pipelines.batch.resources import Resources, plan_resources
from pipelines.errors import RunFailed
from tests.pipelines.driving import Trial, summaries


def plan(num_rows: int = 10_000, **given: Any) -> Resources:
    cluster = {"num_cpus": 18.0, "num_cores": 16, "num_gpus": 0.0, "device": "cpu"}
    asked = {"num_workers": None, "rows_per_block": None, "worker_memory_bytes": 0}
    return plan_resources(num_rows, **cluster | asked | given)


def test_workers_divide_a_machine() -> None:
    two = plan()
    assert (two.num_workers, two.num_threads, two.worker_cpus) == (2, 8, 8.0)
    assert two.memory_share == pytest.approx(0.4)
    four = plan(num_workers=4)
    assert (four.num_threads, four.worker_cpus) == (4, 4.0)
    assert four.memory_share == pytest.approx(0.2)
    assert plan(num_cpus=2.0, num_cores=2).worker_cpus == 0.0, "a worker that asks may wait forever"


def test_a_gpu_is_one_workers_alone() -> None:
    use = plan(device="cuda", num_gpus=4.0)
    assert (use.num_workers, use.memory_share) == (4, 0.8)
    with pytest.raises(RunFailed, match="5 workers need a GPU each, the cluster has 4"):
        plan(device="cuda", num_gpus=4.0, num_workers=5)


def test_what_a_kill_can_undo_grows_with_the_workers() -> None:
    assert plan(num_workers=1).blocks_at_risk == 6
    assert plan(num_workers=3).blocks_at_risk == 18


@pytest.mark.parametrize(
    ("num_rows", "num_workers", "rows"),
    [
        (0, 1, 1),
        (15, 1, 15),
        (16, 1, 8),
        (24, 1, 12),
        (40, 1, 10),
        (24, 2, 8),
        (1000, 1, 32),
        (100_000, 1, 129),
        (100_000, 4, 129),
    ],
)
def test_all_workers_have_blocks_to_the_end(num_rows: int, num_workers: int, rows: int) -> None:
    assert plan(num_rows, num_workers=num_workers).rows_per_block == rows
    assert plan(num_rows, num_workers=num_workers, rows_per_block=3).rows_per_block == 3


def test_a_worker_decodes_the_documents_of_two_blocks_together(
    trial: Trial, undisturbed: dict[str, str]
) -> None:
    trial.arguments["task"] |= {"company_s": 10.0}
    trial.here(limit=48)
    (widest,) = trial.journal.glob("*.widest")
    assert int(widest.read_text()) > 8, "no step had more documents than a block has"
    rows = summaries(trial.output)
    assert len(rows) == 48
    assert rows.items() <= undisturbed.items()
