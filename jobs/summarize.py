"""Summarize a Parquet corpus with an LED model: `python -m jobs.summarize`."""

import logging
import sys
from pathlib import Path
from typing import Any

import click
import pyarrow as pa

from jobs.options import collect, read_yaml, run
from jobs.report import print_plan, print_report
from longformer_core.checkpoints.directory import check_directory
from longformer_core.checkpoints.weights import resolve
from longformer_core.config import LEDConfig
from longformer_core.errors import CheckpointError
from longformer_core.generation.config import GenerationConfig
from pipelines.batch.driver import BatchOptions, allowed_failures, run_batch
from pipelines.cluster import has_gpu
from pipelines.corpus.listing import Corpus, list_corpus
from pipelines.errors import Refused
from pipelines.rows import InputColumn, output_schema
from pipelines.run_directory.directory import inspect_run
from pipelines.storage import Location, check_room, locate
from pipelines.tasks.summarize import Summarize

GENERATION = (
    "num_beams",
    "max_new_tokens",
    "min_length",
    "length_penalty",
    "no_repeat_ngram_size",
    "early_stopping",
)
COUNT = click.IntRange(min=1)


def _input_options(command: Any) -> Any:
    for option in reversed(
        [
            click.option("--input", "input", multiple=True, metavar="PATH...",
                         help="Parquet files, directories or globs; local, s3://, gs://, az://."),
            click.argument("more_input", nargs=-1, metavar=""),
            click.option("--output", required=True, help="The run directory."),
            click.option("--model", required=True,
                         help="A published LED directory, its URL, or a hub id."),
            click.option("--text-column", default="text", show_default=True),
            click.option("--id-column", help="Default: id; without such a column file#row."),
            click.option("--keep-columns", multiple=True, metavar="A,B",
                         help="Input columns to carry over."),
            click.option("--keep-as", multiple=True, metavar="OLD=NEW",
                         help="Carry a column over under another name."),
            click.option("--limit", type=COUNT, help="Only the first N rows."),
            click.option("--skip-bad-files", is_flag=True,
                         help="Leave unreadable files out; the manifest lists them."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def _generation_options(command: Any) -> Any:
    for option in reversed(
        [
            click.option("--num-beams", type=COUNT),
            click.option("--max-new-tokens", type=COUNT),
            click.option("--min-length", type=click.IntRange(min=0)),
            click.option("--length-penalty", type=float),
            click.option("--no-repeat-ngram-size", type=click.IntRange(min=0)),
            click.option("--early-stopping", type=click.Choice(["true", "false", "never"])),
            click.option("--do-sample", is_flag=True, help="Sample; each row has its own seed."),
            click.option("--seed", type=int, default=0, show_default=True),
            click.option("--max-source-tokens", type=click.IntRange(min=3),
                         help="<s> and </s> included. Default: the encoder's positions."),
            click.option("--on-long", type=click.Choice(["truncate", "error"]),
                         default="truncate", show_default=True),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def _run_options(command: Any) -> Any:
    for option in reversed(
        [
            click.option("--batch-tokens", type=COUNT,
                         help="Source tokens encoded at once. Default: what suits the device."),
            click.option("--rows-per-block", type=COUNT,
                         help="Default: rows / (32 x workers), at least 8 and at most 128."),
            click.option("--num-workers", type=COUNT,
                         help="Default: one a GPU, or one for every eight cores."),
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto"),
            click.option("--dtype",
                         type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
                         default="auto", help="auto: float32 on CPUs, bfloat16 on GPUs."),
            click.option("--max-errors", default="1%", show_default=True, metavar="N|P%",
                         help="Failed rows that the run and its resumes may have."),
            click.option("--dry-run", is_flag=True, help="Check everything, print the plan, stop."),
            click.option("--new-run", is_flag=True, help="Refuse a directory that holds rows."),
            click.option("--address", help="A Ray cluster. Default: RAY_ADDRESS, else our own."),
            click.option("--stall-timeout-s", type=click.FloatRange(min=1.0), default=120.0,
                         show_default=True, help="Fail when nothing moves for so long."),
            click.option("--config", type=click.Path(exists=True, dir_okay=False),
                         is_eager=True, callback=read_yaml, expose_value=False,
                         help="Flat YAML with these options, underscores for dashes."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(name="summarize")
@_input_options
@_generation_options
@_run_options
def summarize(**options: Any) -> None:
    """Summarize a folder of Parquet files: one output row per input row, whatever happens.

    \b
    Example:
      longhaul summarize --input corpus/ --output run/ --model led-base-16384 --num-beams 4

    Started again after any end, the same command goes on where it stopped.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    options["input"] = [*options["input"], *options.pop("more_input")]
    device = options["device"]
    if device == "auto":
        device = "cuda" if has_gpu(options["address"]) else "cpu"
    corpus, task, output, fingerprint = validate(options, device)
    if options["dry_run"]:
        print_plan(corpus, task, output, device)
        return
    report = run_batch(
        task,
        corpus,
        output,
        fingerprint=fingerprint,
        recorded={k: v for k, v in options.items() if v not in (None, (), "")},
        options=BatchOptions(
            device=device,
            num_workers=options["num_workers"],
            rows_per_block=options["rows_per_block"],
            max_errors=options["max_errors"],
            stall_timeout_s=options["stall_timeout_s"],
            address=options["address"],
            new_run=options["new_run"],
        ),
    )
    print_report(report)


def validate(
    options: dict[str, Any], device: str
) -> tuple[Corpus, Summarize, Location, dict[str, Any]]:
    """Check everything that can be checked before work begins.

    Raises: Refused with every problem found.
    """
    problems: list[str] = []
    task: Summarize | None = None
    corpus: Corpus | None = None
    output: Location | None = None
    if not options["input"]:
        problems.append("--input: give at least one file, directory or glob")
    with collect(problems):
        task = _task(options, device, problems)
    kept: dict[str, str] = {}
    with collect(problems):
        kept = _kept(options)
    with collect(problems):
        output = locate(options["output"])
    with collect(problems):
        reserved = output_schema(Summarize.columns, pa.schema([])).names
        if options["input"]:
            corpus = list_corpus(
                options["input"],
                inputs=[InputColumn("text", (options["text_column"],))],
                id_column=options["id_column"],
                kept=kept,
                reserved=reserved,
                skip_bad_files=options["skip_bad_files"],
                limit=options["limit"],
                output=output,
            )
    with collect(problems):
        allowed_failures(options["max_errors"], 0)
    if problems or task is None or corpus is None or output is None:
        raise Refused(problems)
    fingerprint = fingerprint_of(task, corpus)
    with collect(problems):
        inspect_run(output, fingerprint, new_run=options["new_run"], skipped=corpus.skipped)
    carried = corpus.num_bytes * 3 if corpus.kept else 0
    problems += check_room(output, corpus.num_rows * task.output_row_bytes() + carried)
    if problems:
        raise Refused(problems)
    return corpus, task, output, fingerprint


def fingerprint_of(task: Summarize, corpus: Corpus) -> dict[str, Any]:
    """All that can change a row."""
    columns = corpus.column_fingerprint()
    return task.fingerprint() | {"columns": columns, "input": corpus.listing()}


def _task(options: dict[str, Any], device: str, problems: list[str]) -> Summarize | None:
    try:
        directory = resolve(options["model"])
    except CheckpointError as error:
        problems.append(f"--model: {error}")
        return None
    found = check_directory(directory)
    if found:
        problems += [f"--model: {p}" for p in found]
        return None
    config = LEDConfig.from_pretrained(directory)
    limit = options["max_source_tokens"] or config.max_encoder_position_embeddings
    if limit > config.max_encoder_position_embeddings:
        problems.append(
            f"--max-source-tokens {limit}: the encoder has "
            f"{config.max_encoder_position_embeddings} positions"
        )
    # Workers read the directory from wherever they run.
    model = options["model"]
    if Path(model).expanduser().is_dir():
        model = str(directory.absolute())
    dtype = options["dtype"]
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return Summarize(
        model=model,
        generation=_generation(options, directory, config),
        max_source_tokens=limit,
        on_long=options["on_long"],
        dtype=dtype,
        batch_tokens=options["batch_tokens"],
        seed=options["seed"],
    )


def _generation(options: dict[str, Any], directory: Any, config: LEDConfig) -> GenerationConfig:
    given = {name: options[name] for name in GENERATION if options[name] is not None}
    if "early_stopping" in given and given["early_stopping"] != "never":
        given["early_stopping"] = given["early_stopping"] == "true"
    # A model's own do_sample is not taken: a batch job gives the same rows twice unless asked.
    given["do_sample"] = options["do_sample"]
    generation = GenerationConfig.from_pretrained(directory).replace(**given)
    generation.check(config)
    return generation


def _kept(options: dict[str, Any]) -> dict[str, str]:
    names = [name.strip() for given in options["keep_columns"] for name in given.split(",")]
    kept = {name: name for name in names if name}
    for pair in options["keep_as"]:
        old, equals, new = pair.partition("=")
        if not (equals and old and new):
            raise Refused(f"--keep-as {pair!r}: give old=new")
        kept[old] = new
    return kept


def main() -> int:
    return run(summarize)


if __name__ == "__main__":
    sys.exit(main())
