"""The summarization job as a benchmark runs it: through its pipeline, timed without its start."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset as pads

from jobs.summarize import fingerprint_of
from pipelines.batch.driver import BatchOptions, run_batch
from pipelines.corpus.listing import list_corpus
from pipelines.rows import InputColumn
from pipelines.storage import locate
from pipelines.tasks.base import Output
from pipelines.tasks.summarize import Summarize, SummarizeWorker


@dataclass(frozen=True, kw_only=True)
class Timed(Summarize):
    """Notes when its first document begins."""

    note: str

    def load_worker(self, device: str, num_threads: int, memory_share: float) -> "TimedWorker":
        return TimedWorker(self, device, num_threads, memory_share)


class TimedWorker(SummarizeWorker):
    def __init__(self, task: Timed, device: str, num_threads: int, memory_share: float) -> None:
        super().__init__(task, device, num_threads, memory_share)
        self.note = Path(task.note)

    def __call__(
        self, documents: Sequence[tuple[str, Sequence[int]]], on_progress: Callable[[], None]
    ) -> Iterator[tuple[int, Output]]:
        if not self.note.exists():
            self.note.write_text(str(time.time()))
        return super().__call__(documents, on_progress)


def run_job(task: Timed, corpus: Path, output: Path, num_workers: int) -> None:
    listed = list_corpus(
        [str(corpus)], inputs=[InputColumn("text", ("text",))], id_column="id", kept={}
    )
    run_batch(
        task,
        listed,
        locate(str(output)),
        fingerprint=fingerprint_of(task, listed),
        recorded={},
        options=BatchOptions(device="cpu", num_workers=num_workers),
    )


def job_seconds(task: Timed, output: Path) -> float:
    """Return the time from the first document's first token to the last row written."""
    first = float(Path(task.note).read_text())
    last = max(file.stat().st_mtime for file in (output / "output").glob("*.parquet"))
    return last - first


def job_rows(output: Path) -> dict[str, str]:
    """id -> summary."""
    rows = pads.dataset(str(output / "output")).to_table(columns=["id", "summary"])
    return dict(zip(rows["id"].to_pylist(), rows["summary"].to_pylist(), strict=True))
