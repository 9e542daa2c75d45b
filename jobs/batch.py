"""The command of a batch task: every task has the same options of a run, and the same end."""

import logging
from typing import Annotated, Any, Literal

import click
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, field_validator

from jobs.options import click_options, collect, config_option, read_options
from jobs.report import print_plan, print_report
from pipelines.batch import BatchOptions, run_batch
from pipelines.batch.driver import allowed_failures, fingerprint_of
from pipelines.cluster import has_gpu
from pipelines.corpus.listing import Corpus, list_corpus
from pipelines.errors import Refused
from pipelines.rows import output_schema
from pipelines.run_directory.directory import inspect_run
from pipelines.storage import Location, check_room, locate
from pipelines.tasks.base import Count, Task, split_names


class RunOptions(BaseModel):
    """What a batch run is asked for beside its task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: tuple[str, ...] = Field(
        (),
        description="Files, directories or globs: Parquet, JSON Lines, CSV; local, s3://, gs://, az://.",
    )
    output: str = Field(description="The run directory.")
    id_column: str | None = Field(
        None, description="Default: id; without such a column, file#row. file#row makes ids."
    )
    keep_columns: tuple[str, ...] = Field(
        (),
        description="Input columns to carry over.",
        json_schema_extra={"comma_separated": True},
    )
    keep_as: tuple[str, ...] = Field(
        (),
        description="Carry a column over under another name.",
        json_schema_extra={"metavar": "OLD=NEW"},
    )
    limit: Count | None = Field(None, description="Only the first N rows.")
    skip_bad_files: bool = Field(
        False, description="Leave unreadable files out; the manifest lists them."
    )
    rows_per_block: Count | None = Field(
        None, description="Default: rows / (32 x workers), at least 8 and at most 128."
    )
    num_workers: Count | None = Field(
        None, description="Default: one a GPU, or one for every eight cores."
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_errors: str = Field(
        "1%",
        description="Failed rows that the run and its resumes may have.",
        json_schema_extra={"metavar": "N|P%"},
    )
    dry_run: bool = Field(False, description="Check everything, print the plan, stop.")
    format: Literal["text", "json"] = Field(
        "text", description="How plan and report are printed; json is one object."
    )
    new_run: bool = Field(False, description="Refuse a directory that holds rows.")
    address: str | None = Field(
        None, description="A Ray cluster. Default: RAY_ADDRESS, else our own."
    )
    stall_timeout_s: Annotated[float, Field(ge=1.0)] = Field(
        120.0, description="Fail when nothing moves for so long."
    )

    _split = field_validator("keep_columns", mode="before")(split_names)

    def kept(self) -> dict[str, str]:
        """Return input columns to carry over, each with its name in the output."""
        kept = {name: name for name in self.keep_columns}
        for pair in self.keep_as:
            old, equals, new = pair.partition("=")
            if not (equals and old and new):
                raise Refused(f"--keep-as {pair!r}: give old=new")
            kept[old] = new
        return kept

    def batch_options(self, device: str) -> BatchOptions:
        """Return what of them the driver needs."""
        return BatchOptions(
            device=device,
            num_workers=self.num_workers,
            rows_per_block=self.rows_per_block,
            max_errors=self.max_errors,
            stall_timeout_s=self.stall_timeout_s,
            address=self.address,
            new_run=self.new_run,
        )


def task_command(task_class: type[Task], purpose: str, example: str) -> click.Command:
    """Return the command line of a task over a corpus.

    purpose: what it does, in a sentence. example: options that show it at work.
    """

    def callback(more_input: tuple[str, ...], **given: Any) -> None:
        given = {name: value for name, value in given.items() if value is not None}
        given["input"] = (*given["input"], *more_input)
        of_run = {name: given.pop(name) for name in RunOptions.model_fields if name in given}
        options = read_options(task_class.options_class, given)
        run_task(task_class, options, read_options(RunOptions, of_run))

    return click.Command(
        task_class.name,
        callback=callback,
        params=[
            click.Argument(["more_input"], nargs=-1, metavar=""),
            *click_options(RunOptions, task_class.options_class),
            config_option(),
        ],
        help=(
            f"{purpose}\n\n\b\nExample:\n  longhaul {task_class.name} {example}\n\n"
            "Every input row comes out once, good or with its error. Started again after any end, "
            "the same command goes on where it stopped."
        ),
    )


def run_task(task_class: type[Task], options: Any, run: RunOptions) -> None:
    """Check everything, run, and report."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    device = run.device
    if device == "auto":
        device = "cuda" if has_gpu(run.address) else "cpu"
    corpus, task, output = validate(task_class, options, run, device)
    if run.dry_run:
        print_plan(corpus, task, output, device, run.format)
        return
    recorded = run.model_dump(mode="json") | options.model_dump(mode="json")
    print_report(
        run_batch(
            task,
            corpus,
            output,
            options=run.batch_options(device),
            recorded={k: v for k, v in recorded.items() if v not in (None, [])},
        ),
        run.format,
    )


def validate(
    task_class: type[Task], options: Any, run: RunOptions, device: str
) -> tuple[Corpus, Task, Location]:
    """Check everything that can be checked before work begins.

    Raises: Refused with every problem found.
    """
    problems: list[str] = []
    task: Task | None = None
    corpus: Corpus | None = None
    output: Location | None = None
    kept: dict[str, str] = {}
    if not run.input:
        problems.append("--input: give at least one file, directory or glob")
    with collect(problems):
        task = task_class.from_options(options, device=device)
    with collect(problems):
        kept = run.kept()
    with collect(problems):
        output = locate(run.output)
    with collect(problems):
        # Without a task there are still files to look at: a user wants every problem at once.
        if run.input:
            columns = task.columns if task else pa.schema([])
            corpus = list_corpus(
                run.input,
                inputs=task_class.inputs_of(options),
                id_column=run.id_column,
                kept=kept,
                reserved=output_schema(columns, pa.schema([])).names,
                skip_bad_files=run.skip_bad_files,
                limit=run.limit,
                output=output,
            )
    with collect(problems):
        allowed_failures(run.max_errors, 0)
    if problems or task is None or corpus is None or output is None:
        raise Refused(problems)
    fingerprint = fingerprint_of(task, corpus)
    with collect(problems):
        inspect_run(output, fingerprint, new_run=run.new_run, skipped=corpus.skipped)
    carried = corpus.num_bytes * 3 if corpus.kept else 0
    problems += check_room(output, corpus.num_rows * task.output_row_bytes() + carried)
    if problems:
        raise Refused(problems)
    return corpus, task, output
