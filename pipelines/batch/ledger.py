"""The ledger of a batch run: one small actor that outlives the workers.

Workers tell it what they begin and finish. From that it knows how far the run is, whether the
error budget is spent, and, when a worker process dies, which blocks it died on: each of them is
then run one document at a time, with nothing else in its worker, and a document that was alone when
its worker died is given up.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pipelines.run_directory.schemas import RowCounts, TokenCounts


@dataclass(frozen=True)
class BlockAssignment:
    """How to run a block. `given_up` documents have killed their worker and are not run again."""

    one_by_one: bool = False
    given_up: frozenset[str] = frozenset()
    stop: bool = False


@dataclass(frozen=True)
class Tally:
    """What a finished block, or a whole run so far, amounts to."""

    rows: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.rows + other.rows,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            self.errors + other.errors,
        )

    @property
    def failed(self) -> int:
        return self.errors.total()

    def counts(self, rows_in: int) -> tuple[RowCounts, TokenCounts]:
        """Return what `status.json` says of a run over so many rows."""
        rows = RowCounts(rows_in=rows_in, ok=self.rows - self.failed, failed=self.failed)
        return rows, TokenCounts(tokens_in=self.tokens_in, out=self.tokens_out)


def budget_message(total: Tally, samples: dict[str, str]) -> str:
    """Return what the user is told when too many rows failed. samples: a message a type."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in total.errors.most_common())
    lines = [f"  {kind}: {message}" for kind, message in samples.items()]
    return "\n".join([f"{total.failed} rows failed ({kinds}), more than --max-errors", *lines])


@dataclass(frozen=True)
class Snapshot:
    """The ledger at one moment. `moved` changes whenever anything moved."""

    done: Tally
    moved: int
    num_loading: int
    num_deaths: int
    load_s: float
    samples: dict[str, str]  # error type -> one message
    num_begun: int
    over_budget: bool


class Ledger:
    """Runs as an actor of the driver's node, without a CPU of its own."""

    def __init__(self, max_failed: int, failed_before: int) -> None:
        self._max_failed, self._failed_before = max_failed, failed_before
        self._done: dict[str, Tally] = {}
        self._total = Tally()
        self._running: dict[str, str] = {}  # block -> its worker
        self._alone: dict[str, str] = {}  # block -> the one document that its worker runs
        self._dead: set[str] = set()  # workers
        self._suspects: set[str] = set()  # blocks that lost a worker
        self._given_up: dict[str, set[str]] = {}
        self._num_begun = 0
        self._samples: dict[str, str] = {}
        self._workers: dict[str, Any] = {}  # handles, under whatever names they gave
        self._loading: dict[str, float] = {}
        self._load_s = 0.0
        self._moved = 0

    def loading(self, worker: str, handle: Any) -> None:
        self._moved += 1
        self._workers[worker] = handle
        self._loading.setdefault(worker, time.monotonic())

    def loaded(self, worker: str) -> None:
        self._moved += 1
        self._load_s += time.monotonic() - self._loading.pop(worker, time.monotonic())

    def workers(self) -> list[Any]:
        return list(self._workers.values())

    def begin(self, block: str, worker: str) -> BlockAssignment:
        """A worker starts on a block. A block that runs in another has lost that one.

        Every process is another worker: names are not used again.
        """
        self._moved += 1
        if self._over_budget():
            return BlockAssignment(stop=True)
        lost = self._running.get(block, worker)
        alone = self._alone.pop(block, None)
        if lost != worker:
            self._dead.add(lost)
            self._suspects.add(block)
            if alone is not None:
                self._given_up.setdefault(block, set()).add(alone)
        self._running[block] = worker
        self._num_begun += 1
        return BlockAssignment(block in self._suspects, frozenset(self._given_up.get(block, ())))

    def alone(self, block: str, document: str) -> None:
        """The worker of a block now runs this one document and nothing else."""
        self._moved += 1
        self._alone[block] = document

    def moved(self) -> None:
        """Something went on inside a block: no result yet, but no stall either."""
        self._moved += 1

    def finish(self, block: str, tally: Tally, samples: dict[str, str]) -> None:
        self._moved += 1
        self._running.pop(block, None)
        self._alone.pop(block, None)
        if block not in self._done:  # a block run again after its node was lost counts once
            self._done[block] = tally
            self._total = self._total + tally
        self._samples = samples | self._samples

    def snapshot(self) -> Snapshot:
        return Snapshot(
            done=self._total,
            moved=self._moved,
            num_loading=len(self._loading) if not self._done else 0,
            num_deaths=len(self._dead),
            load_s=self._load_s,
            samples=self._samples,
            num_begun=self._num_begun,
            over_budget=self._over_budget(),
        )

    def _over_budget(self) -> bool:
        return self._failed_before + self._total.failed > self._max_failed


def call(actor: Any, method: str, *args: Any) -> Any:
    """Call the ledger and wait for the answer."""
    import ray

    return ray.get(getattr(actor, method).remote(*args))


def this_actor() -> Any:
    """The handle of the actor that this code runs in."""
    import ray

    return ray.get_runtime_context().current_actor
