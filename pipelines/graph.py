"""The batch graph and what it takes of a cluster: read, tokenize, generate, write, over any task.

    Parquet row groups -> Tokenize (CPU tasks) -> Generate (an actor per worker) -> Parquet files

The four are separate Ray Data operators on a first run and on a resume. Rows stay Arrow from end
to end, one row per document, so that Ray's row-id checkpoint holds.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.checkpoint import CheckpointConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.corpus import ID, Corpus
from pipelines.errors import RunFailed
from pipelines.heap import KEEP_MEMORY
from pipelines.ledger import Ledger
from pipelines.reading import ParquetCorpus
from pipelines.runs import Run
from pipelines.stages import Generate, Task, Tokenize
from pipelines.watch import WatchCallback

# Ray merges neighbouring operators whose resources are equal, and a merged operator is one task
# from read to write: nothing is durable before its end. So no two neighbours ask for the same.
# Reading and writing wait for disks and networks: they ask for no CPU, so that a write is never
# kept waiting (what is generated and not written is lost by a kill) and a reader that is held
# back never sits on the CPU that the next operator needs to take its rows. Tokenizing keeps Ray's
# default of one CPU, for then Ray merges the cut into blocks of N rows with it.


# Blocks that a worker runs at once, each in a thread of its own: the last documents of one leave
# places that those of the other take.
BLOCKS_AT_ONCE = 2
# One more waits at the worker, so that its place is taken without a word from the driver.
_BLOCKS_IN_FLIGHT = BLOCKS_AT_ONCE + 1
# What of the free memory workers plan with: Ray and the other operators take some too.
_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Resources:
    """What one run takes of the cluster."""

    num_workers: int
    device: str
    num_threads: int  # of torch, in each worker on a CPU
    worker_cpus: float
    worker_memory_bytes: int
    rows_per_block: int

    @property
    def blocks_at_risk(self) -> int:
        """Most blocks whose work a kill can undo: as many as the workers hold, and as many again
        that wait to be written."""
        return 2 * _BLOCKS_IN_FLIGHT * self.num_workers

    @property
    def memory_share(self) -> float:
        """What of the free memory one worker may plan with. A GPU is one worker's alone; on CPUs
        all workers may be on one machine, as their threads suppose too."""
        return _MEMORY_SHARE if self.device == "cuda" else _MEMORY_SHARE / self.num_workers


def plan_resources(
    num_rows: int,
    *,
    num_workers: int | None,
    rows_per_block: int | None,
    device: str,
    num_cpus: float,
    num_cores: int,
    num_gpus: float,
    worker_memory_bytes: int,
) -> Resources:
    """Divide a cluster of `num_cpus` logical CPUs (on `num_cores` cores) among the operators.

    The checkpoint filter of a resume takes a CPU and so does the widest of the other operators;
    what is left is the workers'. Where nothing is left the workers ask for none: they set their
    threads themselves, and a plan that hangs for want of a logical CPU helps nobody.
    Raises: RunFailed if there are fewer GPUs than workers.
    """
    if device == "cuda":
        count = num_workers or max(1, int(num_gpus))
        if count > num_gpus:
            raise RunFailed(f"{count} workers need a GPU each, the cluster has {num_gpus:g}")
        threads, cpus = 1, min(1.0, _share(num_cpus, count))
    else:
        count = num_workers or max(1, num_cores // 8)
        threads = max(1, num_cores // count)
        cpus = float(min(threads, int(_share(num_cpus, count))))
    rows = rows_per_block or _rows_per_block(num_rows, BLOCKS_AT_ONCE * count)
    return Resources(count, device, threads, cpus, max(1, worker_memory_bytes), rows)


def _rows_per_block(num_rows: int, at_once: int) -> int:
    """Return so few rows that a kill undoes little, and no odd block is worked on alone at the end.

    at_once: blocks that all workers work on together.
    """
    num_blocks = num_rows // min(max(num_rows // (16 * at_once), 8), 128)
    if num_blocks > at_once:
        num_blocks -= num_blocks % at_once
    return math.ceil(num_rows / max(1, num_blocks)) or 1


def _share(num_cpus: float, num_workers: int) -> float:
    return max(0.0, (num_cpus - 2) / num_workers)


@contextlib.contextmanager
def started_ledger(max_failed: int, failed_before: int) -> Iterator[Any]:
    """The ledger lives on the driver's node: it must outlive every worker node.

    Its end is the end of the workers too. Ray Data only lets go of their handles, which after a
    failure sit in reference cycles: until some later garbage collection the workers would keep
    their CPUs from the next run in this process, which then waits for them forever.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here, max_concurrency=1)
    ledger = actor.remote(max_failed, failed_before)
    try:
        yield ledger
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            for worker in ray.get(ledger.workers.remote(), timeout=10.0):
                ray.kill(worker)
        ray.kill(ledger)


def configure(run: Run) -> None:
    """Set Ray Data up for a run: checkpoint, watch, no bars and no retries of its own."""
    context = DataContext.get_current()
    checkpoint = CheckpointConfig(
        ID,
        run.checkpoint.path,
        delete_checkpoint_on_success=False,
        override_filesystem=run.location.filesystem,
    )
    checkpoint.checkpoint_actor_pool_max_size = 1
    checkpoint.checkpoint_actor_memory_bytes = 64 * 2**20
    context.checkpoint_config = checkpoint
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    context.execution_options.preserve_order = False
    context.custom_execution_callback_classes = [WatchCallback]
    # Their advice about memory and idle operators is for people who write graphs, not for users.
    context.issue_detectors_config.detectors = []


def build(task: Task, corpus: Corpus, resources: Resources, ledger: Any) -> Dataset:
    """The graph up to the write."""
    kept = corpus.kept_schema
    rows = resources.rows_per_block
    # On a CPU tensors lie in the heap of the process.
    needs: dict[str, Any] = {"runtime_env": {"env_vars": KEEP_MEMORY}}
    if resources.device == "cuda":
        needs = {"num_gpus": 1}
    num_row_groups = sum(1 for f in corpus.files for _, count in f.row_groups if count)
    return (
        ray.data.read_datasource(
            # One block per task: left to itself Ray cuts each task's rows into blocks to make up
            # the parallelism it wishes for.
            ParquetCorpus(corpus),
            num_cpus=0,
            concurrency=min(resources.num_workers + 1, num_row_groups),
            override_num_blocks=num_row_groups,
        )
        .map_batches(
            Tokenize(task, kept.names),
            batch_size=rows,
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
        .repartition(target_num_rows_per_block=rows)
        .map_batches(
            Generate,
            fn_constructor_args=(
                task,
                ledger,
                resources.device,
                resources.num_threads,
                resources.memory_share,
                kept,
            ),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=resources.worker_cpus,
            memory=resources.worker_memory_bytes,
            compute=ActorPoolStrategy(
                size=resources.num_workers,
                max_tasks_in_flight_per_actor=_BLOCKS_IN_FLIGHT,
                max_concurrent_calls_per_actor=BLOCKS_AT_ONCE,
                enable_true_multi_threading=True,  # or a lock lets one call in at a time
            ),
            **needs,
        )
    )


def write(dataset: Dataset, run: Run) -> None:
    """Run the graph to its end. Append only: every other mode loses rows on a resume."""
    dataset.write_parquet(
        run.output.path,
        filesystem=run.location.filesystem,
        mode="append",
        try_create_dir=False,
        ray_remote_args={"num_cpus": 0},
    )
