"""How a run is spread over a cluster: workers, blocks and memory."""

import math
from dataclasses import dataclass

from pipelines.errors import RunFailed

# Blocks that a worker runs at once, each in a thread of its own: the last documents of one leave
# places that those of the other take.
BLOCKS_AT_ONCE = 2


# One more waits at the worker, so that its place is taken without a word from the driver.
BLOCKS_IN_FLIGHT = BLOCKS_AT_ONCE + 1


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
        return 2 * BLOCKS_IN_FLIGHT * self.num_workers

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
