"""What every job's command line shares: a flat YAML beside the flags, exit codes, error text."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
import yaml

from longformer_core.errors import LongformerError, did_you_mean
from pipelines.errors import PipelineError, Refused

EXIT_USAGE, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130


def read_yaml(context: click.Context, _: click.Parameter, path: str | None) -> str | None:
    """Take defaults from a flat YAML file: option names with underscores.

    Flags on the command line win. Raises: click.UsageError for unknown keys and nested values.
    """
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            raise click.UsageError(f"{path}: is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise click.UsageError(f"{path}: must hold option names and values")
    known = [p.name for p in context.command.params if p.name not in (None, "config", "more_input")]
    names = [str(k) for k in known]
    unknown = [f"{key!r}{did_you_mean(str(key), names)}" for key in values if key not in names]
    if unknown:
        raise click.UsageError(f"{path}: unknown option {', '.join(unknown)}")
    nested = [key for key, value in values.items() if isinstance(value, dict)]
    if nested:
        raise click.UsageError(f"{path}: {', '.join(nested)}: values are flat, not tables")
    context.default_map = {k: _as_text(v) for k, v in values.items()}
    return path


def _as_text(value: Any) -> Any:
    """YAML reads `true` and `3`; flags are words, and are checked as words."""
    if isinstance(value, list):
        return [str(v) for v in value]
    return value if isinstance(value, bool) or value is None else str(value)


@contextmanager
def collect(problems: list[str]) -> Iterator[None]:
    """Note what a check refuses and go on: a user wants every problem at once."""
    try:
        yield
    except Refused as error:
        problems += error.problems
    except LongformerError as error:
        problems.append(str(error))


def run(command: click.Command) -> int:
    """Run a command and return its exit code; errors become text on stderr."""
    return exit_code(lambda: command.main(standalone_mode=False))


def exit_code(call: Callable[[], Any]) -> int:
    """Call and turn what it raises into the exit code that stands for it."""
    try:
        call()
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.UsageError as error:
        error.show()
        return EXIT_USAGE
    except Refused as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    return 0
