"""The end of a run: count what was really written, repeat the failed rows, list the result.

Nothing here trusts what the graph reported. The output is read back from storage and compared
with the ids of the input, row by row. Finalizing may be cut off and done again at any time.
"""

import io
import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from pipelines.batch.ledger import Tally
from pipelines.corpus.listing import ID, Corpus, InputFile, read_ids
from pipelines.corpus.reading import read_piece
from pipelines.errors import RunFailed
from pipelines.rows import ERROR
from pipelines.run_directory.directory import Run
from pipelines.run_directory.schemas import FileEntry
from pipelines.storage import Location

logger = logging.getLogger(__name__)

_COLUMNS = ["id", "num_tokens_in", "num_tokens_out", "truncated", "error"]
_NUM_THREADS = 8


@dataclass
class Written:
    """What stands in the output files."""

    files: list[FileEntry] = field(default_factory=list)
    ids: pa.ChunkedArray = field(default_factory=lambda: pa.chunked_array([], pa.string()))
    errors: dict[str, dict[str, str]] = field(default_factory=dict)  # id -> error
    truncated: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def tally(self) -> Tally:
        kinds = Counter(e["type"] for e in self.errors.values())
        return Tally(len(self.ids), self.tokens_in, self.tokens_out, kinds)


def read_written(files: Sequence[Location]) -> Written:
    """Read the output back. Hashes are of the bytes as they lie in storage."""
    written, ids = Written(), []
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for entry, table in pool.map(_read_file, files):
            written.files.append(entry)
            ids += table.column("id").chunks
            failed = table.filter(table.column("error").is_valid())
            failed_ids, errors = failed.column("id").to_pylist(), failed.column("error").to_pylist()
            written.errors.update(zip(failed_ids, errors, strict=True))
            written.truncated += pc.sum(table.column("truncated")).as_py() or 0
            written.tokens_in += pc.sum(table.column("num_tokens_in")).as_py() or 0
            written.tokens_out += pc.sum(table.column("num_tokens_out")).as_py() or 0
    written.ids = pa.chunked_array(ids, pa.string())
    return written


def _read_file(file: Location) -> tuple[FileEntry, pa.Table]:
    data = file.read_bytes()
    table = pq.read_table(io.BytesIO(data), columns=_COLUMNS)
    name = file.path.rpartition("/")[2]
    entry = FileEntry(
        path=f"output/{name}",
        rows=table.num_rows,
        bytes=len(data),
        xxh64=xxhash.xxh64(data).hexdigest(),
    )
    return entry, table


def compare(corpus: Corpus, written: Written) -> list[str]:
    """Every id of the input is in the output once, and nothing else. Returns what is wrong."""
    expected = pa.chunked_array([read_ids(corpus, f) for f in corpus.files], pa.string())
    found = written.ids
    distinct = pc.count_distinct(found).as_py()
    problems = []
    if distinct != len(found):
        problems.append(f"{len(found) - distinct} rows are in the output more than once")
    missing = pc.filter(expected, pc.invert(pc.is_in(expected, value_set=found)))
    if len(missing):
        problems.append(f"{len(missing)} rows are missing, for example {missing[0].as_py()!r}")
    strange = pc.filter(found, pc.invert(pc.is_in(found, value_set=expected)))
    if len(strange) and not corpus.skipped:
        problems.append(f"{len(strange)} rows are not of this input, e.g. {strange[0].as_py()!r}")
    return problems


def write_dead_letter(run: Run, corpus: Corpus, errors: dict[str, dict[str, str]]) -> int:
    """Repeat the failed rows with their input columns and their error; returns their number.

    One file per input file that has any, under the user's own column names, so that the directory
    can be the input of another run.
    """
    target = run.dead_letter
    for info in target.files():
        target.filesystem.delete_file(info.path)
    if not errors:
        return 0
    target.make_directory()
    failed = pa.array(list(errors), pa.string())
    num_rows = 0
    for number, file in enumerate(corpus.files):
        if not pc.any(pc.is_in(read_ids(corpus, file), value_set=failed)).as_py():
            continue
        table = _failed_rows(corpus, file, failed, errors)
        num_rows += table.num_rows
        sink = io.BytesIO()
        pq.write_table(table, sink)
        target.join(f"{number:06d}.parquet").write_bytes(sink.getvalue())
    return num_rows


def _failed_rows(
    corpus: Corpus, file: InputFile, failed: pa.Array, errors: dict[str, dict[str, str]]
) -> pa.Table:
    source, parts = corpus.unjoined(), []
    for piece in file.pieces:
        for rows in read_piece(source, file, piece):
            part = rows.filter(pc.is_in(rows.column(ID), value_set=failed))
            if part.num_rows:
                parts.append(part)
    rows = pa.concat_tables(parts)
    ids = rows.column(ID)
    columns = {corpus.id_column or ID: ids}
    for given in source.inputs:
        columns.setdefault(given.columns[0], rows.column(given.name))
    for old, new in corpus.kept.items():
        columns.setdefault(old, rows.column(new))
    columns.setdefault("error", pa.array([errors[i] for i in ids.to_pylist()], ERROR))
    return pa.table(columns)


def audit(run: Run, corpus: Corpus, *, complete: bool) -> Written:
    """Read the output back and account for every row of the input.

    `complete` False (the error budget ended the run) asks only that nothing is there twice.
    Raises: RunFailed if the output and the input do not agree.
    """
    started = time.monotonic()
    written = read_written(run.committed_files())
    problems = compare(corpus, written) if complete else []
    if problems:
        raise RunFailed(
            f"{run.location}: the audit found that output and input do not agree: "
            f"{'; '.join(problems)}. Nothing was marked as a result; keep the directory and start "
            "a new run in another --output"
        )
    logger.info("audited %d rows in %.1f s", len(written.ids), time.monotonic() - started)
    return written
