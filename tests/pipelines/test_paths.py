"""How many files of ours a row passes on its way from a Parquet file to an output block."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pipelines.batch import stages
from pipelines.batch.ledger import Ledger
from pipelines.batch.stages import Generate, Tokenize
from pipelines.corpus.listing import list_corpus
from pipelines.corpus.reading import CorpusDatasource
from pipelines.tasks.summarize import Summarize, SummarizeOptions
from tests.pipelines.driving import ROOT

# Six of them touch no value of a row: storage, listing, rows, base, worker_process and ledger.
MOST_FILES = 14


def test_a_row_passes_few_files(
    corpus: Path, led_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the read task of a listed file and the block that Ray writes; the core is beyond."""
    monkeypatch.setattr(stages, "call", lambda actor, method, *a: getattr(actor, method)(*a))
    monkeypatch.setattr(stages, "this_actor", object)
    monkeypatch.setattr(stages, "_LEDGER_INTERVAL_S", 3600.0)  # it has no answer without Ray
    options = SummarizeOptions(model=str(led_directory), max_new_tokens=8)
    task = Summarize.from_options(options, device="cpu")
    listed = list_corpus([str(corpus)], inputs=task.inputs, limit=8)
    (read, *_) = CorpusDatasource(listed).get_read_tasks(1)
    tokenize = Tokenize(task, [])
    generate = Generate(task, Ledger(0, 0), "cpu", 2, 0.5, listed.kept_schema)
    passed: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            passed.setdefault(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        rows = [generate(tokenize(block)) for block in read()]
    finally:
        sys.setprofile(None)
    assert sum(block.num_rows for block in rows) == 8
    assert all(block.column("summary").null_count == 0 for block in rows)
    files = [Path(name) for name in passed]
    ours = [str(f.relative_to(ROOT)) for f in files if f.is_relative_to(ROOT / "pipelines")]
    print("\n".join(ours))
    assert len(ours) <= MOST_FILES
