"""The driver's eye on a running graph: progress, heartbeat, stall, budget.

A thread looks at the ledger. What it decides is raised inside Ray Data's scheduling loop, through
Ray's execution callback, so that the graph is taken down in order.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipelines.batch.ledger import Snapshot, Tally, budget_message
from pipelines.batch.metrics import MetricsWriter
from pipelines.batch.worker_process import Throttle
from pipelines.errors import BudgetExceeded, PipelineError, RunFailed, Stalled
from pipelines.run_directory.directory import Run
from pipelines.run_directory.ownership import HEARTBEAT_S

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_STEP_S = 0.2
_METRICS_S = 10.0
_METRICS_FLUSH_S = 60.0
_LOADING_TIMEOUT_S = 1800.0  # a model may come from a hub
_SETTLE_S = 2.0  # from a block's last word to the ledger to its place in the write queue, and more
_HANG_S = 60.0  # after this an abort that the scheduling loop does not take ends the process

# Ray constructs the callbacks itself, from classes, so the monitor can reach its own only here.
_active: "Monitor | None" = None


class MonitorCallback(ExecutionCallback):  # type: ignore[misc]
    """Hands every step of Ray Data's scheduling loop to the active monitor."""

    def on_execution_step(self, executor: Any) -> None:
        if _active is not None:
            _active.on_step(executor)


class Monitor:
    """Watches over one run between `with` and its end.

    before: the rows that earlier attempts made durable. show: gets every new total.
    """

    def __init__(
        self,
        run: Run,
        ledger: Any,
        *,
        rows_in: int,
        before: Tally,
        stall_timeout_s: float,
        show: Callable[[Tally], None],
    ) -> None:
        self.run, self.ledger = run, ledger
        self.rows_in, self.before = rows_in, before
        self.stall_timeout_s = stall_timeout_s
        self.show = show
        self.snapshot: Snapshot | None = None
        self._metrics = MetricsWriter(run)
        self._abort: PipelineError | None = None
        self._abort_time = 0.0
        self._step = Throttle(_STEP_S)
        self._operators: list[dict[str, Any]] = []
        self._seen: object = None
        self._moved_time = time.monotonic()
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="monitor", daemon=True)

    def __enter__(self) -> "Monitor":
        global _active
        _active = self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        self._finished.set()
        self._thread.join(timeout=10.0)
        _active = None
        self._look()
        self.flush_metrics()

    @property
    def total(self) -> Tally:
        """Rows of this attempt and of those before."""
        return self.before + (self.snapshot.done if self.snapshot else Tally())

    # --- in Ray's scheduling loop ---

    def on_step(self, executor: Any) -> None:
        """Note how the operators stand; raise what the monitor decided on."""
        if not self._step.is_due():
            return
        self._operators = [_describe(op, state) for op, state in executor._topology.items()]
        abort = self._abort
        if abort is None:
            return
        # What is generated is still written when the budget ends the run: the user wants to see
        # the rows that failed.
        unwritten = sum(o["queued"] + o["active"] for o in self._operators if o["name"] == "Write")
        settled = not unwritten and time.monotonic() - self._abort_time > _SETTLE_S
        if settled or not isinstance(abort, BudgetExceeded):
            raise abort

    # --- in the monitor's own thread ---

    def _loop(self) -> None:
        at_intervals = [
            (Throttle(HEARTBEAT_S), self._beat),
            (Throttle(_METRICS_S), self._note_metrics),
            (Throttle(_METRICS_FLUSH_S), self.flush_metrics),
        ]
        while not self._finished.wait(_LOOK_S):
            self._look()
            self._decide()
            for throttle, call in at_intervals:
                if throttle.is_due():
                    call()

    def _look(self) -> None:
        try:
            self.snapshot = ray.get(self.ledger.snapshot.remote(), timeout=10.0)
        except ray.exceptions.RayError as error:
            # It starts beside the workers, which on few cores takes a while.
            level = logging.INFO if self.snapshot is None else logging.WARNING
            logger.log(level, "the ledger does not answer: %s", type(error).__name__)
        seen = (self.snapshot and self.snapshot.moved, [o["done"] for o in self._operators])
        if seen != self._seen:
            self._seen, self._moved_time = seen, time.monotonic()
        self.show(self.total)

    def _decide(self) -> None:
        now, snapshot = time.monotonic(), self.snapshot
        if self._abort is not None:
            if now - self._abort_time > _HANG_S:
                self._end_process()
            return
        limit_s = self.stall_timeout_s
        if snapshot is not None and snapshot.num_loading > 0:
            limit_s = max(limit_s, _LOADING_TIMEOUT_S)
        still_s = now - self._moved_time
        if still_s > limit_s:
            self._end(Stalled(f"nothing moved for {still_s:.0f} s\n{self._dump()}"))
        elif snapshot is not None and snapshot.over_budget:
            self._end(BudgetExceeded(budget_message(self.total, snapshot.samples)))

    def _end(self, error: PipelineError) -> None:
        self._abort_time = time.monotonic()
        self._abort = error

    def _beat(self) -> None:
        try:
            if not self.run.ownership.beat():
                self._end(RunFailed("another process has taken this run directory over"))
                return
            self.run.write_status("running", *self.total.counts(self.rows_in))
        except OSError as error:
            logger.warning("status cannot be written: %s", error)

    def _note_metrics(self) -> None:
        self._metrics.note(self.total, self.snapshot, self._operators)

    def flush_metrics(self) -> None:
        """Write the metrics noted since the last time, and how the run stands now."""
        self._note_metrics()
        self._metrics.flush()

    def _dump(self) -> str:
        """Return operators and free resources, for whoever has to find out why nothing moves."""
        lines = [
            f"  {o['name']}: {o['active']} running, {o['queued']} queued, {o['done']} done"
            for o in self._operators
        ]
        free, have = ray.available_resources(), ray.cluster_resources()
        names = [n for n in sorted(have) if not n.startswith("node:")]
        lines += [f"  {name}: {free.get(name, 0):g} of {have[name]:g} free" for name in names]
        return "\n".join(lines)

    def _end_process(self) -> None:
        logger.error("the graph does not end; ending the process: %s", self._abort)
        self.run.write_status("failed", *self.total.counts(self.rows_in), str(self._abort))
        os._exit(getattr(self._abort, "exit_code", 1))


def _describe(op: Any, state: Any) -> dict[str, Any]:
    inside = getattr(op, "internal_input_queue_num_blocks", None)
    return {
        "name": op.name,
        "active": op.num_active_tasks(),
        "queued": sum(len(q) for q in state.input_queues) + (inside() if inside else 0),
        "done": op.metrics.num_tasks_finished,
    }
