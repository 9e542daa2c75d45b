"""A batch run: a task over a corpus into a run directory, from the first look to `_SUCCESS`."""

import contextlib
import importlib.metadata
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import ray
from ray.data.exceptions import SystemException

from pipelines.batch.audit import Written, audit, read_written, write_dead_letter
from pipelines.batch.graph import build, configured, started_ledger, write
from pipelines.batch.ledger import Snapshot, Tally, budget_message
from pipelines.batch.monitor import Monitor
from pipelines.batch.progress import show_progress
from pipelines.batch.resources import Resources, plan_resources
from pipelines.cluster import Cluster, check_visible, connect
from pipelines.corpus.listing import Corpus
from pipelines.errors import BudgetExceeded, PipelineError, Refused, RunFailed
from pipelines.run_directory.directory import Run, inspect_run, open_run, read_manifest
from pipelines.run_directory.schemas import (
    InputEntry,
    Manifest,
    ManifestRows,
    SkippedEntry,
    TokenCounts,
)
from pipelines.storage import Location, locate
from pipelines.tasks.base import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchOptions:
    """How to run; none of it can change a row, so all of it may change on a resume."""

    device: str
    num_workers: int | None = None
    rows_per_block: int | None = None
    max_errors: str = "1%"
    stall_timeout_s: float = 120.0
    address: str | None = None
    new_run: bool = False


@dataclass(frozen=True)
class Report:
    """What a run came to."""

    location: Location
    manifest: Manifest
    resumed_rows: int


def run_batch(
    task: Task,
    corpus: Corpus,
    output: Location | str,
    *,
    options: BatchOptions,
    recorded: Mapping[str, Any] | None = None,
) -> Report:
    """Run a task over a corpus into a run directory, or go on where an earlier attempt ended.

    What the run sets in this process (Ray Data's context, environment, loggers, handlers of
    signals) is put back at its end.

    Example:
        >>> task = Summarize.from_options(Summarize.Options(model="led"), device="cpu")
        >>> corpus = list_corpus(["reports/"], inputs=task.inputs)
        >>> report = run_batch(task, corpus, "run", options=BatchOptions(device="cpu"))
        >>> report.manifest.rows.ok

    recorded: the options as the user gave them, for config.yaml; by default the task's.
    Raises: Refused before any work, BudgetExceeded, RunFailed. The directory stays resumable.
    """
    location = locate(output) if isinstance(output, str) else output
    fingerprint = fingerprint_of(task, corpus)
    skipped = list(corpus.skipped)
    max_failed = allowed_failures(options.max_errors, corpus.num_rows)
    found = inspect_run(location, fingerprint, new_run=options.new_run, skipped=skipped)
    if found.completed:
        return Report(location, read_manifest(location), corpus.num_rows)
    config = dict(recorded or task.options.model_dump(mode="json", exclude_none=True))
    with open_run(location, fingerprint, config, new_run=options.new_run, skipped=skipped) as run:
        attempt = _Attempt(run, task, corpus, fingerprint, max_failed)
        with _ended_by_signals(attempt):
            return attempt.execute(options)


def fingerprint_of(task: Task, corpus: Corpus) -> dict[str, Any]:
    """Return all that can change a row."""
    return task.fingerprint() | {"columns": corpus.column_fingerprint(), "input": corpus.listing()}


class _Attempt:
    """One attempt at a run, from opening the directory to `_SUCCESS`."""

    def __init__(
        self,
        run: Run,
        task: Task,
        corpus: Corpus,
        fingerprint: dict[str, Any],
        max_failed: int,
    ) -> None:
        self.run, self.task, self.corpus = run, task, corpus
        self.fingerprint, self.max_failed = fingerprint, max_failed
        self.total = Tally()
        self.timings: dict[str, float] = {}
        self.monitor: Monitor | None = None

    def execute(self, options: BatchOptions) -> Report:
        """Do what is left to do and finalize; whatever ends it early is in the status."""
        try:
            return self._execute(options)
        except PipelineError as error:
            self._status("failed", str(error))
            raise
        except (ray.exceptions.RayError, pa.ArrowException, OSError) as error:
            message = root_cause(error)
            self._status("failed", message)
            raise RunFailed(f"{message}\nthe same command goes on from here") from error

    def _execute(self, options: BatchOptions) -> Report:
        self.run.clear_pending()
        before = read_written(self.run.committed_files()).tally
        self.total = before
        self._status("running")
        try:
            if before.rows < self.corpus.num_rows and before.failed <= self.max_failed:
                self._run_graph(options, before)
            return self._finalize(before)
        except BudgetExceeded:
            # The rows that failed are what the user will want to look at.
            self._close("failed", audit(self.run, self.corpus, complete=False))
            raise

    def _run_graph(self, options: BatchOptions, before: Tally) -> None:
        started = time.monotonic()
        # Ray puts a SIGTERM handler of its own in place when it starts, so ours goes on top again.
        with connect(options.address) as cluster, _ended_by_signals(self):
            check_visible([self.run.location, self.corpus.root, *self.task.locations()])
            resources = _resources(self.task, self.corpus, options, cluster)
            self._announce(resources, before)
            self.timings["start_s"] = time.monotonic() - started
            started = time.monotonic()
            rows_in = self.corpus.num_rows
            with (
                configured(self.run),
                started_ledger(self.max_failed, before.failed) as ledger,
                show_progress(rows_in, before) as show,
            ):
                self.monitor = monitor = Monitor(
                    self.run,
                    ledger,
                    rows_in=rows_in,
                    before=before,
                    stall_timeout_s=options.stall_timeout_s,
                    show=show,
                )
                try:
                    with monitor:
                        write(build(self.task, self.corpus, resources, ledger), self.run)
                finally:
                    self.total = monitor.total
                    self._note_times(monitor.snapshot, time.monotonic() - started, resources)

    def _announce(self, resources: Resources, before: Tally) -> None:
        """What a reader of the log needs to know before the first row."""
        rows = self.corpus.num_rows
        done = f", {before.rows} done before" if before.rows else ""
        print(
            f"{rows} rows{done}; {resources.num_workers} worker(s) on {resources.device}, "
            f"{resources.rows_per_block} rows a block; a kill undoes at most "
            f"{resources.blocks_at_risk} blocks of work",
            file=sys.stderr,
            flush=True,
        )

    def _note_times(self, snapshot: Snapshot | None, graph_s: float, use: Resources) -> None:
        self.timings["graph_s"] = graph_s
        if snapshot is not None:
            self.timings["model_load_s"] = snapshot.load_s / use.num_workers

    def _finalize(self, before: Tally) -> Report:
        self._status("finalizing")
        started = time.monotonic()
        written = audit(self.run, self.corpus, complete=self.total.failed <= self.max_failed)
        self.total = written.tally
        self.timings["finalize_s"] = time.monotonic() - started
        if written.tally.failed > self.max_failed:
            samples = {e["type"]: e["message"] for e in written.errors.values()}
            raise BudgetExceeded(budget_message(written.tally, samples))
        manifest = self._close("completed", written)
        self.run.mark_success()
        self._status("completed")
        return Report(self.run.location, manifest, before.rows)

    def _close(self, state: Any, written: Written) -> Manifest:
        write_dead_letter(self.run, self.corpus, written.errors)
        self.total = written.tally
        corpus, tally = self.corpus, written.tally
        manifest = Manifest(
            run_id=self.run.run_id,
            status=state,
            fingerprint=self.fingerprint,
            rows=ManifestRows(
                rows_in=corpus.num_rows,
                ok=tally.rows - tally.failed,
                failed=tally.failed,
                truncated=written.truncated,
            ),
            errors=dict(tally.errors),
            tokens=TokenCounts(tokens_in=tally.tokens_in, out=tally.tokens_out),
            timings={name: round(value, 3) for name, value in self.timings.items()},
            versions=versions(),
            input=[
                InputEntry(path=f.name, rows=f.num_rows, bytes=f.num_bytes) for f in corpus.files
            ],
            skipped=[SkippedEntry(path=p, reason=r) for p, r in corpus.skipped.items()],
            files=written.files,
        )
        self.run.write_manifest(manifest)
        return manifest

    def _status(self, state: Any, message: str = "") -> None:
        if not self.run.ownership.held:
            return  # another process has the directory now, and says there how it stands
        try:
            self.run.write_status(state, *self.total.counts(self.corpus.num_rows), message)
        except OSError as error:  # a full disk must not hide the error that filled it
            logger.warning("status cannot be written: %s", error)

    def end_by_signal(self, number: int) -> NoReturn:
        """Say so on the disk first: whoever sent the signal may not wait long."""
        if self.monitor is not None:
            self.total = self.monitor.total
        self._status("cancelled", f"ended by {signal.Signals(number).name}")
        if self.monitor is not None:
            self.monitor.flush_metrics()
        with contextlib.suppress(OSError):
            self.run.ownership.release()
        print("cancelled; the same command goes on from here", file=sys.stderr, flush=True)
        ending = threading.Thread(target=ray.shutdown, daemon=True)
        ending.start()
        ending.join(timeout=1.5)
        os._exit(128 + number)


@contextlib.contextmanager
def _ended_by_signals(attempt: _Attempt) -> Iterator[None]:
    """SIGTERM and SIGINT end the process at once, with the status written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    old = {n: signal.signal(n, lambda number, _: attempt.end_by_signal(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _resources(task: Task, corpus: Corpus, options: BatchOptions, cluster: Cluster) -> Resources:
    return plan_resources(
        corpus.num_rows,
        num_workers=options.num_workers,
        rows_per_block=options.rows_per_block,
        device=options.device,
        num_cpus=cluster.num_cpus,
        num_cores=cluster.num_cores,
        num_gpus=cluster.num_gpus,
        worker_memory_bytes=task.worker_memory_bytes(),
    )


def allowed_failures(max_errors: str, num_rows: int) -> int:
    """`N` rows, or `P%` of all rows, rounded down.

    Raises: Refused if it is neither.
    """
    text = max_errors.strip()
    try:
        if text.endswith("%"):
            share = float(text[:-1])
            if 0 <= share <= 100:
                return int(num_rows * share / 100 + 1e-9)  # 2.3 % of 3000 is 69, not 68.99
        elif int(text) >= 0:
            return int(text)
    except ValueError:
        pass
    raise Refused(f"--max-errors {max_errors!r}: give a number of rows or a percentage like 1%")


def root_cause(error: BaseException) -> str:
    """The message a user can act on, from below Ray's wrapping."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        if isinstance(inner, SystemException):  # says only that Ray does not blame user code
            break
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and re.match(r"[\w.]+: ", lines[-1]):
        return lines[-1]  # the end of a traceback from another process
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def versions() -> dict[str, str]:
    names = ("longhaul", "ray", "torch", "tokenizers", "pyarrow")
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
