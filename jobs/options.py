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
            values = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise click.UsageError(f"{path}: is not YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise click.UsageError(f"{path}: must hold option names and values")
    known = {
        str(p.name): p
        for p in context.command.params
        if isinstance(p, click.Option) and p.expose_value
    }
    unknown = [f"{key!r}{did_you_mean(str(key), known)}" for key in values if key not in known]
    if unknown:
        raise click.UsageError(f"{path}: unknown option {', '.join(unknown)}")
    for key, value in values.items():
        items = value if isinstance(value, list) and known[key].multiple else [value]
        if any(isinstance(item, dict | list) for item in items):
            several = "a value or a flat list" if known[key].multiple else "one value"
            raise click.UsageError(f"{path}: {key} takes {several}, not {value!r}")
    context.default_map = {k: _as_typed(known[k], v) for k, v in values.items() if v is not None}
    return path


def _as_typed(option: click.Option, value: Any) -> Any:
    """YAML reads `true` and `3`; options are words, and are checked as words."""
    if option.multiple:
        return [_word(v) for v in (value if isinstance(value, list) else [value])]
    return value if option.is_flag else _word(value)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
