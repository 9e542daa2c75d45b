"""The summarization job as a benchmark runs it: through its pipeline, timed without its start."""

import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset as pads

from pipelines.batch import BatchOptions, run_batch
from pipelines.corpus.listing import list_corpus
from pipelines.tasks.base import Document, Process
from pipelines.tasks.summarize import Summarize


@dataclass(frozen=True)
class Timed(Summarize):
    """Notes in the file `note` when its first document begins."""

    note: str = ""

    def process(self, document: Document) -> Process:
        if not Path(self.note).exists():
            Path(self.note).write_text(str(time.time()))
        return super().process(document)


def run_job(task: Timed, corpus: Path, output: Path, num_workers: int) -> None:
    listed = list_corpus([str(corpus)], inputs=task.inputs, id_column="id", kept={})
    run_batch(
        task, listed, str(output), options=BatchOptions(device="cpu", num_workers=num_workers)
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
