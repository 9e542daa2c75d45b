"""The batch graph and what it takes of a cluster: read, tokenize, generate, write, over any task.

    input files -> Tokenize (CPU tasks) -> Generate (an actor per worker) -> Parquet files

The four are separate Ray Data operators on a first run and on a resume. Rows stay Arrow from end
to end, one row per document, so that Ray's row-id checkpoint holds.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.checkpoint import CheckpointConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.batch.ledger import Ledger
from pipelines.batch.monitor import MonitorCallback
from pipelines.batch.resources import BLOCKS_AT_ONCE, BLOCKS_IN_FLIGHT, Resources
from pipelines.batch.stages import Generate, Tokenize
from pipelines.batch.worker_process import KEEP_MEMORY
from pipelines.corpus.listing import ID, Corpus
from pipelines.corpus.reading import CorpusDatasource
from pipelines.run_directory.directory import Run
from pipelines.tasks.base import Task

# Ray merges neighbouring operators whose resources are equal, and a merged operator is one task
# from read to write: nothing is durable before its end. So no two neighbours ask for the same.
# Reading and writing wait for disks and networks: they ask for no CPU, so that a write is never
# kept waiting (what is generated and not written is lost by a kill) and a reader that is held
# back never sits on the CPU that the next operator needs to take its rows. Tokenizing keeps Ray's
# default of one CPU, for then Ray merges the cut into blocks of N rows with it.


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


@contextlib.contextmanager
def configured(run: Run) -> Iterator[None]:
    """Set Ray Data up for a run: checkpoint, monitor, no bars and no retries of its own.

    In a context of the run's own: the program's next pipeline must know nothing of ours.
    """
    context = DataContext.get_current().copy()
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
    context.custom_execution_callback_classes = [MonitorCallback]
    # Their advice about memory and idle operators is for people who write graphs, not for users.
    context.issue_detectors_config.detectors = []
    with DataContext.current(context):
        yield


def build(task: Task, corpus: Corpus, resources: Resources, ledger: Any) -> Dataset:
    """The graph up to the write."""
    kept = corpus.kept_schema
    rows = resources.rows_per_block
    # On a CPU tensors lie in the heap of the process.
    needs: dict[str, Any] = {"runtime_env": {"env_vars": KEEP_MEMORY}}
    if resources.device == "cuda":
        needs = {"num_gpus": 1}
    return (
        ray.data.read_datasource(
            # One block per task: left to itself Ray cuts each task's rows into blocks to make up
            # the parallelism it wishes for.
            CorpusDatasource(corpus),
            num_cpus=0,
            concurrency=min(resources.num_workers + 1, corpus.num_pieces),
            override_num_blocks=corpus.num_pieces,
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
                max_tasks_in_flight_per_actor=BLOCKS_IN_FLIGHT,
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
