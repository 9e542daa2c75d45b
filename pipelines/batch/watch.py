"""The driver's watch over a running graph: progress, heartbeat, stall, budget.

A thread looks at the ledger. What it decides is raised inside Ray Data's scheduling loop, through
Ray's execution callback, so that the graph is taken down in order.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipelines.batch.ledger import Snapshot, Tally
from pipelines.errors import BudgetExceeded, PipelineError, RunFailed, Stalled
from pipelines.run_directory.directory import Run
from pipelines.run_directory.ownership import HEARTBEAT_S
from pipelines.run_directory.schemas import RowCounts, TokenCounts

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_METRICS_S = 10.0
_METRICS_FLUSH_S = 60.0
_LOADING_TIMEOUT_S = 1800.0  # a model may come from a hub
_SETTLE_S = 2.0  # from a block's last word to the ledger to its place in the write queue, and more
_HANG_S = 60.0  # after this an abort that the scheduling loop does not take ends the process

# Ray constructs the callbacks itself, from classes, so the watch can reach its own only here.
_active: "Watch | None" = None


class WatchCallback(ExecutionCallback):  # type: ignore[misc]
    """Hands every step of Ray Data's scheduling loop to the active watch."""

    def on_execution_step(self, executor: Any) -> None:
        if _active is not None:
            _active.on_step(executor)


class Watch:
    """Watches one run between `with` and its end.

    `before` counts the rows that earlier attempts made durable; `show` gets every snapshot.
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
        self._abort: PipelineError | None = None
        self._abort_time = 0.0
        self._operators: list[dict[str, Any]] = []
        self._write_idle = False
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._last_step = 0.0
        self._metrics: list[str] = []

    def __enter__(self) -> "Watch":
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
        now = time.monotonic()
        if now - self._last_step < 0.2:
            return
        self._last_step = now
        self._operators = [_describe(op, state) for op, state in executor._topology.items()]
        waiting = [o["queued"] + o["active"] for o in self._operators if o["name"] == "Write"]
        self._write_idle = not any(waiting)
        abort = self._abort
        if abort is None:
            return
        # What is generated is still written when the budget ends the run: the user wants to see
        # the rows that failed.
        settled = self._write_idle and now - self._abort_time > _SETTLE_S
        if settled or not isinstance(abort, BudgetExceeded):
            raise abort

    # --- in the watch's own thread ---

    def _watch(self) -> None:
        last_move, last_change = None, time.monotonic()
        beat = metrics = flush = time.monotonic()
        while not self._finished.wait(_LOOK_S):
            now = time.monotonic()
            self._look()
            move = (self.snapshot and self.snapshot.moved, [o["done"] for o in self._operators])
            if move != last_move:
                last_move, last_change = move, now
            self._decide(now - last_change)
            if now - beat > HEARTBEAT_S:
                beat = now
                self._beat()
            if now - metrics > _METRICS_S:
                metrics = now
                self._metrics.append(self._metrics_line())
            if now - flush > _METRICS_FLUSH_S:
                flush = now
                self.flush_metrics()

    def _look(self) -> None:
        try:
            self.snapshot = ray.get(self.ledger.snapshot.remote(), timeout=10.0)
        except ray.exceptions.RayError as error:
            logger.warning("the ledger does not answer: %s", type(error).__name__)
        self.show(self.total)

    def _decide(self, still_s: float) -> None:
        if self._abort is not None:
            if time.monotonic() - self._abort_time > _HANG_S:
                self._end_process()
            return
        snapshot = self.snapshot
        loading = snapshot is not None and snapshot.num_loading > 0
        limit = _LOADING_TIMEOUT_S if loading else self.stall_timeout_s
        if still_s > max(limit, self.stall_timeout_s):
            self.abort(Stalled(f"nothing moved for {still_s:.0f} s\n{self.dump()}"))
        elif snapshot is not None and snapshot.over_budget:
            self.abort(BudgetExceeded(budget_message(self.total, snapshot.samples)))

    def abort(self, error: PipelineError) -> None:
        self._abort_time = time.monotonic()
        self._abort = error

    def _beat(self) -> None:
        try:
            if not self.run.ownership.beat():
                self.abort(RunFailed("another process has taken this run directory over"))
                return
            self.write_status("running")
        except OSError as error:
            logger.warning("status cannot be written: %s", error)

    def write_status(self, state: Any, message: str = "") -> None:
        rows, tokens = counts(self.rows_in, self.total)
        self.run.write_status(state, rows, tokens, message)

    def flush_metrics(self) -> None:
        """Write what was noted since the last time, and how it stands now."""
        lines, self._metrics = [*self._metrics, self._metrics_line()], []
        try:
            self.run.write_metrics(lines)
        except OSError as error:
            logger.warning("metrics cannot be written: %s", error)

    def _metrics_line(self) -> str:
        total, snapshot = self.total, self.snapshot
        line = {
            "time": time.time(),
            "rows": total.rows,
            "failed": total.failed,
            "tokens_in": total.tokens_in,
            "tokens_out": total.tokens_out,
            "blocks_begun": snapshot.num_begun if snapshot else 0,
            "worker_deaths": snapshot.num_deaths if snapshot else 0,
            "operators": self._operators,
        }
        return json.dumps(line) + "\n"

    def dump(self) -> str:
        """Operators and free resources, for whoever has to find out why nothing moves."""
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
        self.write_status("failed", str(self._abort))
        os._exit(getattr(self._abort, "exit_code", 1))


def budget_message(total: Tally, samples: dict[str, str]) -> str:
    kinds = ", ".join(f"{n} {kind}" for kind, n in total.errors.most_common())
    lines = [f"  {kind}: {message}" for kind, message in samples.items()]
    return "\n".join([f"{total.failed} rows failed ({kinds}), more than --max-errors", *lines])


def counts(rows_in: int, total: Tally) -> tuple[RowCounts, TokenCounts]:
    rows = RowCounts(rows_in=rows_in, ok=total.rows - total.failed, failed=total.failed)
    return rows, TokenCounts(tokens_in=total.tokens_in, out=total.tokens_out)


def _describe(op: Any, state: Any) -> dict[str, Any]:
    inside = getattr(op, "internal_input_queue_num_blocks", None)
    return {
        "name": op.name,
        "active": op.num_active_tasks(),
        "queued": sum(len(q) for q in state.input_queues) + (inside() if inside else 0),
        "done": op.metrics.num_tasks_finished,
    }
