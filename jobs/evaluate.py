"""Compare the rows of a run with references: `python -m jobs.evaluate`."""

import io
import json
import sys
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from jobs.options import read_options, run
from jobs.report import print_scores
from longformer_core.errors import LongformerError
from pipelines.errors import Refused
from pipelines.run_directory.directory import read_manifest
from pipelines.storage import Location, locate
from pipelines.tasks import task_class
from pipelines.tasks.base import Task


@click.command(name="evaluate")
@click.argument("directory", metavar="RUN")
@click.option("--reference-column", required=True, help="The column that holds what is right.")
@click.option(
    "--references",
    metavar="PATH",
    help="Parquet files with an id and the reference column. Default: the run's kept columns.",
)
@click.option("--id-column", default="id", show_default=True, help="Of --references.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
def evaluate(
    directory: str, reference_column: str, references: str | None, id_column: str, form: Any
) -> None:
    """Score a completed run, and write evaluation.json and evaluation.parquet into it.

    \b
    Example:
      longhaul evaluate run/ --reference-column abstract --references papers/

    Rows without a reference are left out and counted; a failed row counts as an empty answer.
    """
    place = locate(directory)
    task = _task_of(place)
    rows = _rows(place)
    given = _references(rows, reference_column, references, id_column)
    kept = [each for each in given if each is not None]
    if not kept:
        raise Refused(f"no row has a reference in {reference_column!r}")
    try:
        # Of all rows: those without a reference may be the right answers of others.
        predictions = [
            found
            for found, each in zip(task.predictions(rows), given, strict=True)
            if each is not None
        ]
        rows = rows.filter(pa.array([each is not None for each in given]))
        scores = task.score(predictions, task.references(rows, kept))
    except LongformerError as error:
        raise Refused(f"{reference_column!r}: {error}") from error
    result = {
        "task": task.name,
        "reference_column": reference_column,
        "rows": len(kept),
        "rows_without_reference": len(given) - len(kept),
        "rows_failed": scores.num_failed,
        "scores": scores.summary,
    }
    place.join("evaluation.json").write_json(result)
    names = list(dict.fromkeys(name for row in scores.per_row for name in row))
    table = pa.table(
        {
            "id": rows.column("id"),
            "reference": pa.array([_text(each) for each in kept], pa.large_string()),
            "prediction": pa.array([_text(each) for each in predictions], pa.large_string()),
            **{name: [row.get(name) for row in scores.per_row] for name in names},
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    place.join("evaluation.parquet").write_bytes(sink.getvalue())
    print_scores(result, place, form)


def _task_of(place: Location) -> Task:
    try:
        config = yaml.safe_load(place.join("config.yaml").read_bytes())
        found = task_class(config["fingerprint"]["task"])
        names = found.options_class.model_fields
        options = {name: value for name, value in config["options"].items() if name in names}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise Refused(f"{place}: is not the directory of a batch run: {error}") from error
    return found.from_options(read_options(found.options_class, options), device="cpu")


def _rows(place: Location) -> pa.Table:
    if not place.join("_SUCCESS").exists():
        raise Refused(f"{place}: the run has not completed; start it again first")
    return pa.concat_tables(
        pq.read_table(place.join(file.path).path, filesystem=place.filesystem)
        for file in read_manifest(place).files
    )


def _references(rows: pa.Table, column: str, path: str | None, id_column: str) -> list[Any]:
    """The reference of every row, None where it has none."""
    if path is None:
        if column not in rows.column_names:
            raise Refused(
                f"the run did not keep a column {column!r}; name a place that has it with "
                f"--references, or run with --keep-columns {column}"
            )
        own: list[Any] = rows.column(column).to_pylist()
        return own
    place = locate(path)
    try:
        table = pq.read_table(place.path, columns=[id_column, column], filesystem=place.filesystem)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise Refused(f"--references {path}: {error}") from error
    names = map(str, table.column(id_column).to_pylist())
    by_id = dict(zip(names, table.column(column).to_pylist(), strict=True))
    return [by_id.get(name) for name in rows.column("id").to_pylist()]


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def main() -> int:
    return run(evaluate)


if __name__ == "__main__":
    sys.exit(main())
