"""What a job tells at its end, and what it would do: tables on stdout."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from longformer_core.config import LEDConfig
from longformer_core.conversion.convert import Conversion
from pipelines.batch.driver import Report
from pipelines.corpus.listing import Corpus
from pipelines.storage import Location
from pipelines.tasks.summarize import Summarize


def print_report(report: Report) -> None:
    """Rows, tokens, speed, where the time went, and where the result lies."""
    manifest, rows = report.manifest, report.manifest.rows
    graph_s = manifest.timings.get("graph_s", 0.0)
    table = _table(f"Run {manifest.run_id[:8]}: {manifest.status}")
    table.add_row("rows in", f"{rows.rows_in:,}")
    if report.resumed_rows:
        table.add_row("done before", f"{report.resumed_rows:,}")
    table.add_row("ok", f"{rows.ok:,}")
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(manifest.errors.items()))
    table.add_row("failed", f"{rows.failed:,}" + (f" ({kinds})" if kinds else ""))
    table.add_row("truncated", f"{rows.truncated:,}")
    table.add_row("tokens", f"{manifest.tokens.tokens_in:,} in, {manifest.tokens.out:,} out")
    fresh = rows.rows_in - report.resumed_rows
    if graph_s and fresh:
        share = fresh / rows.rows_in
        per_s = manifest.tokens.tokens_in * share / graph_s
        table.add_row("speed", f"{fresh / graph_s:,.1f} documents/s, {per_s:,.0f} tokens/s")
    times = ", ".join(f"{n.removesuffix('_s')} {s:,.1f} s" for n, s in manifest.timings.items())
    if times:
        table.add_row("time", times)
    for skipped in manifest.skipped:
        table.add_row("skipped", f"{skipped.path}: {skipped.reason}")
    table.add_row("output", f"{report.location}/output ({len(manifest.files)} files)")
    if rows.failed:
        table.add_row("failed rows", f"{report.location}/dead_letter")
    _print(table)


def print_plan(corpus: Corpus, task: Summarize, output: Location, device: str) -> None:
    """What a run with these options would do."""
    table = _table("Plan (nothing was written, no model loaded)")
    table.add_row(
        "input", f"{corpus.num_rows:,} rows in {len(corpus.files)} files of {corpus.root}"
    )
    table.add_row("id", corpus.id_column or "file#row")
    for given in corpus.inputs:
        table.add_row(given.role, " + ".join(given.columns))
    for old, new in corpus.kept.items():
        table.add_row("keep", old if old == new else f"{old} as {new}")
    for name, reason in corpus.skipped.items():
        table.add_row("skip", f"{name}: {reason}")
    table.add_row("model", f"{task.model} in {task.dtype} on {device}")
    table.add_row("source", f"at most {task.max_source_tokens} tokens, longer: {task.on_long}")
    options = ", ".join(f"{k}={v}" for k, v in task.generation.to_dict().items() if v is not None)
    table.add_row("generation", options)
    table.add_row("output", str(output))
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


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _print(table: Table) -> None:
    Console().print(table)
