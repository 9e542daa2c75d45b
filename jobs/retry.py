"""Run the failed rows of a run again, into a run of their own: `python -m jobs.retry`."""

import sys
from typing import Any

import click
import yaml

from jobs.batch import RunOptions, run_task
from jobs.options import read_options, run
from pipelines.errors import Refused
from pipelines.storage import locate
from pipelines.tasks import task_class


@click.command(name="retry")
@click.argument("directory", metavar="RUN")
@click.option("--output", help="The new run directory. Default: RUN with -retry behind it.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="OPTION=VALUE",
    help="Change an option of the run, for instance on_long=windows.",
)
def retry(directory: str, output: str | None, changes: tuple[str, ...]) -> None:
    """Run the dead letters of a run again, with its own options.

    \b
    Example:
      longhaul retry run/ --set max_source_tokens=8192

    The rows that fail again are in the dead letters of the new run.
    """
    place = locate(directory)
    try:
        config = yaml.safe_load(place.join("config.yaml").read_bytes())
        options: dict[str, Any] = dict(config["options"])
        task = task_class(config["fingerprint"]["task"])
        columns = config["fingerprint"]["columns"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise Refused(f"{place}: is not the directory of a batch run: {error}") from error
    letters = place.join("dead_letter")
    if not letters.files():
        raise Refused(f"{place}: has no dead letters; no row of it failed, or it has not ended")
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise Refused(f"--set {change!r}: give option=value")
        # As on a command line: a word that its option reads.
        options[name.strip().replace("-", "_")] = value
    # The dead letters hold the id, and every input column as it stood.
    options |= {"input": [str(letters)], "output": output or f"{place}-retry"}
    options["id_column"] = "id" if columns["id"] == "file#row" else columns["id"]
    for name in ("limit", "skip_bad_files"):
        options.pop(name, None)
    of_run = {name: options.pop(name) for name in RunOptions.model_fields if name in options}
    run_task(task, read_options(task.options_class, options), read_options(RunOptions, of_run))


def main() -> int:
    return run(retry)


if __name__ == "__main__":
    sys.exit(main())
