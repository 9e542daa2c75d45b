"""What a job tells at its end, and what it would do: a table for people, JSON for programs.

Both go to stdout; all talk on the way goes to stderr.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from longformer_core.config import LEDConfig
from longformer_core.conversion.convert import Conversion
from pipelines.batch import Report
from pipelines.corpus.listing import Corpus
from pipelines.corpus.reading import sample
from pipelines.storage import Location
from pipelines.tasks.base import Task

Format = Literal["text", "json"]
_BAR = 40  # characters of the longest bar of a histogram


def print_report(report: Report, form: Format = "text") -> None:
    """Rows, tokens, speed, lengths, where the time went, and where the result lies."""
    manifest, rows = report.manifest, report.manifest.rows
    lengths, num_windowed = _read_lengths(report)
    if form == "json":
        _print_json(
            {
                "run": str(report.location),
                "resumed_rows": report.resumed_rows,
                "lengths": lengths,
                "rows_windowed": num_windowed,
                **manifest.model_dump(by_alias=True),
            }
        )
        return
    graph_s = manifest.timings.get("graph_s", 0.0)
    table = _table(f"Run {manifest.run_id[:8]}: {manifest.status}")
    table.add_row("rows in", f"{rows.rows_in:,}")
    if report.resumed_rows:
        table.add_row("done before", f"{report.resumed_rows:,}")
    table.add_row("ok", f"{rows.ok:,}")
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(manifest.errors.items()))
    table.add_row("failed", f"{rows.failed:,}" + (f" ({kinds})" if kinds else ""))
    table.add_row("truncated", f"{rows.truncated:,}")
    if num_windowed:
        table.add_row("in windows", f"{num_windowed:,}")
    table.add_row("tokens", f"{manifest.tokens.tokens_in:,} in, {manifest.tokens.out:,} out")
    fresh = rows.rows_in - report.resumed_rows
    if graph_s and fresh:
        share = fresh / rows.rows_in
        per_s = manifest.tokens.tokens_in * share / graph_s
        table.add_row("speed", f"{fresh / graph_s:,.1f} documents/s, {per_s:,.0f} tokens/s")
    times = ", ".join(f"{n.removesuffix('_s')} {s:,.1f} s" for n, s in manifest.timings.items())
    if times:
        table.add_row("time", times)
    table.add_row("lengths", _bars(lengths))
    for skipped in manifest.skipped:
        table.add_row("skipped", f"{skipped.path}: {skipped.reason}")
    table.add_row("output", f"{report.location}/output ({len(manifest.files)} files)")
    if rows.failed:
        table.add_row("failed rows", f"{report.location}/dead_letter")
    _print(table)


def print_plan(
    corpus: Corpus, task: Task, output: Location, device: str, form: Format = "text"
) -> None:
    """What a run with these options would do."""
    lengths, cut, num_sampled = _sample_lengths(corpus, task)
    if form == "json":
        _print_json(
            {
                "task": task.name,
                "input": str(corpus.root),
                "files": len(corpus.files),
                "rows": corpus.num_rows,
                "id": corpus.id_column or "file#row",
                "columns": {column.role: list(column.columns) for column in corpus.inputs},
                "kept": corpus.kept,
                "skipped": corpus.skipped,
                **task.describe(),
                "device": device,
                "sampled": {"rows": num_sampled, "lengths": lengths, **cut},
                "output": str(output),
            }
        )
        return
    table = _table("Plan (nothing was written, no model loaded)")
    table.add_row(
        "input", f"{corpus.num_rows:,} rows in {len(corpus.files)} files of {corpus.root}"
    )
    table.add_row("id", corpus.id_column or "file#row")
    for column in corpus.inputs:
        table.add_row(column.role, ", ".join(column.columns))
    for old, new in corpus.kept.items():
        table.add_row("keep", old if old == new else f"{old} as {new}")
    for name, reason in corpus.skipped.items():
        table.add_row("skip", f"{name}: {reason}")
    for subject, said in task.describe().items():
        table.add_row(subject, said)
    table.add_row("device", device)
    table.add_row(f"lengths of {num_sampled:,} rows", _bars(lengths))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in cut.items() if count)
    table.add_row("of these", kinds or "none is cut")
    table.add_row("output", str(output))
    _print(table)


def print_scores(result: Mapping[str, Any], place: Location, form: Format = "text") -> None:
    """The metrics of a run, and where the scores of its rows lie."""
    if form == "json":
        _print_json(result)
        return
    table = _table(f"Evaluation of {place}")
    table.add_row("rows", f"{result['rows']:,}")
    for name in ("rows_without_reference", "rows_failed"):
        if result[name]:
            table.add_row(name.replace("_", " "), f"{result[name]:,}")
    for name, value in result["scores"].items():
        table.add_row(name, f"{value:.4f}")
    table.add_row("row by row", f"{place}/evaluation.parquet")
    _print(table)


def print_conversion(plan: Conversion, output: Path, left_out: list[str], *, dry_run: bool) -> None:
    """What a conversion reads and writes, or would."""
    done = "Plan (nothing was written, no weight read)" if dry_run else "Converted"
    table = _table(done)
    config = plan.config
    table.add_row("model", f"{plan.source} ({plan.source_class}, {plan.old_length:,} positions)")
    table.add_row("becomes", f"{plan.target_class}, {plan.new_length:,} positions")
    if isinstance(config, LEDConfig):
        table.add_row("decoder", f"{config.max_decoder_position_embeddings:,} positions, unchanged")
    windows = sorted({2 * radius for radius in config.radii})
    table.add_row("attention window", f"{', '.join(map(str, windows))} tokens, both sides together")
    exact = f"documents of up to {plan.exact_length:,} tokens are answered as by the original"
    table.add_row("exact", exact)
    for note in plan.notes:
        table.add_row("note", note)
    for name in left_out:
        table.add_row("left out", name)
    table.add_row("output", str(output))
    if not dry_run:
        table.add_row("checked", "loads completely; a short document gives finite numbers")
    _print(table)


# --- lengths ----------------------------------------------------------------------------------


def _histogram(lengths: Iterable[int | None]) -> dict[str, int]:
    """Documents by length, in doubling steps: "1-128", "129-256", ...; nulls are left out."""
    steps = Counter(max(7, (length - 1).bit_length()) for length in lengths if length)
    first = f"1-{2**7}"
    return {
        first if step == 7 else f"{2 ** (step - 1) + 1}-{2**step}": steps[step]
        for step in range(min(steps, default=7), max(steps, default=6) + 1)
    }


def _bars(histogram: Mapping[str, int]) -> str:
    if not histogram:
        return "no document with tokens"
    width, most = max(map(len, histogram)), max(histogram.values())
    return "\n".join(
        f"{name:>{width}} {'█' * round(_BAR * count / most):<{_BAR}} {count:,}"
        for name, count in histogram.items()
    )


def _read_lengths(report: Report) -> tuple[dict[str, int], int]:
    """The histogram of a run's output, and how many of its documents are in several windows."""
    lengths: list[int | None] = []
    num_windowed = 0
    for file in report.manifest.files:
        place = report.location.join(file.path)
        with place.filesystem.open_input_file(place.path) as handle:
            rows = pq.read_table(handle, columns=["num_tokens_in", "num_windows"])
        lengths += rows["num_tokens_in"].to_pylist()
        num_windowed += sum(1 for count in rows["num_windows"].to_pylist() if (count or 0) > 1)
    return _histogram(lengths), num_windowed


def _sample_lengths(corpus: Corpus, task: Task) -> tuple[dict[str, int], dict[str, int], int]:
    """The histogram of some rows of a corpus, what would become of them, and how many they are."""
    prepared = [task.prepare(block) for block in sample(corpus)]
    lengths = [n for block in prepared for n in block.column("num_tokens_in").to_pylist()]
    cut = {
        "truncated": sum(1 for b in prepared for t in b.column("truncated").to_pylist() if t),
        "in windows": sum(
            1 for b in prepared for n in b.column("num_windows").to_pylist() if (n or 0) > 1
        ),
        "with errors": sum(b.num_rows - b.column("error").null_count for b in prepared),
    }
    return _histogram(lengths), cut, len(lengths)


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _print(table: Table) -> None:
    Console().print(table)


def _print_json(value: Mapping[str, Any]) -> None:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
