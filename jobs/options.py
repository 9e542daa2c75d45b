"""What every job's command line shares: a flat YAML beside the flags, exit codes, error text."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
import yaml
from annotated_types import Ge
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from longformer_core.errors import LongformerError, did_you_mean
from pipelines.errors import PipelineError, Refused

_Model = TypeVar("_Model", bound=BaseModel)

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


def config_option() -> click.Option:
    """Return `--config`, which reads the other options of its command from a YAML file."""
    return click.Option(
        ["--config"],
        type=click.Path(exists=True, dir_okay=False),
        is_eager=True,
        callback=read_yaml,
        expose_value=False,
        help="Flat YAML with these options, underscores for dashes.",
    )


def click_options(*models: type[BaseModel]) -> list[click.Option]:
    """Return a command-line option for every field of strict models, those required first.

    A field's description is the help; a bool is a flag; a tuple may be given several times, or
    at once with commas between if the field says `comma_separated`.
    """
    fields = {name: field for model in models for name, field in model.model_fields.items()}
    ordered = sorted(fields.items(), key=lambda item: not item[1].is_required())
    return [_click_option(name, field) for name, field in ordered]


def _click_option(name: str, field: FieldInfo) -> click.Option:
    kind, limits = _plain_type(field.annotation, list(field.metadata))
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    settings: dict[str, Any] = {"help": field.description, "required": field.is_required()}
    if not field.is_required() and field.default not in (None, (), "", False):
        settings["default"] = field.default
        settings["show_default"] = bool(str(field.default).strip())
    least: Any = next((limit.ge for limit in limits if isinstance(limit, Ge)), None)
    flag = "--" + name.replace("_", "-")
    if kind is bool and field.default is None:
        flag, settings["default"] = f"{flag}/--no-{flag[2:]}", None
    elif kind is bool:
        settings["is_flag"] = True
    elif get_origin(kind) is tuple:
        settings["multiple"] = True
        if extra.get("comma_separated"):
            settings |= {"metavar": "A,B", "callback": _split}
    elif get_origin(kind) is Literal:
        settings["type"] = click.Choice(list(get_args(kind)))
    elif kind in (int, float):
        number = click.IntRange if kind is int else click.FloatRange
        settings["type"] = number(min=least) if least is not None else kind
    if "metavar" in extra:
        settings["metavar"] = extra["metavar"]
    return click.Option([flag], **settings)


def _split(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    names = [name.strip() for value in given for name in value.split(",")]
    return tuple(name for name in names if name)


def _plain_type(annotation: Any, limits: list[Any]) -> tuple[Any, list[Any]]:
    """Return a field's type without `Annotated` and `| None`, and the limits found on the way."""
    if get_origin(annotation) is Annotated:
        inner, *found = get_args(annotation)
        for each in found:
            limits += each.metadata if isinstance(each, FieldInfo) else [each]
        return _plain_type(inner, limits)
    if get_origin(annotation) in (Union, UnionType):
        (inner,) = (each for each in get_args(annotation) if each is not NoneType)
        return _plain_type(inner, limits)
    return annotation, limits


def read_options(model: type[_Model], values: Mapping[str, Any]) -> _Model:
    """Return a strict model of some values, which may come from flags, YAML or a run's record.

    Raises: Refused with everything that is wrong, by option.
    """
    try:
        return model(**values)
    except ValidationError as error:
        problems = []
        for each in error.errors():
            name = str(each["loc"][0]) if each["loc"] else ""
            flag = "--" + name.replace("_", "-")
            if each["type"] == "extra_forbidden":
                problems.append(f"{flag}: unknown{did_you_mean(name, model.model_fields)}")
            else:
                problems.append(f"{flag} {each['input']!r}: {each['msg']}")
        raise Refused(problems) from None


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
