"""Serve's YAML for clusters: written from options, and checked more strictly than Serve does.

Serve ignores keys that it does not know, even the name of a deployment.
"""

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from longformer_core.errors import did_you_mean
from pipelines.errors import Refused
from pipelines.serve.application import DEPLOYMENTS, IMPORT_PATH, deployment_settings
from pipelines.serve.options import ServeOptions
from pipelines.serve.running import APPLICATION, ENVIRONMENT, LOGGING, PROXY_GRACE_S

_HEAD = """\
# longhaul serve; deploy it with: serve deploy FILE
# Start the cluster's nodes with these in their environment, or Serve's proxy goes without its door:
"""


def write_config(options: ServeOptions, host: str, port: int) -> str:
    """Return the YAML of a served model. `args` hold its options, `deployments` what Serve does."""
    deployments = [
        {"name": name, **{key: _plain(value) for key, value in settings.items()}}
        for name, settings in deployment_settings(options).items()
    ]
    config = {
        "proxy_location": "EveryNode",
        "http_options": {
            "host": host,
            "port": port,
            "request_timeout_s": options.timeout_s + PROXY_GRACE_S,
        },
        "logging_config": LOGGING,
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": options.model_dump(mode="json", exclude_defaults=True),
                "deployments": deployments,
            }
        ],
    }
    lines = "".join(f"#   {name}={value}\n" for name, value in ENVIRONMENT.items())
    text: str = yaml.safe_dump(config, sort_keys=False)
    return _HEAD + lines + text


def check_config(text: str) -> list[ServeOptions]:
    """Return the options of every application of ours in a Serve config.

    Raises: Refused with everything that is wrong: unknown keys at any depth, unknown deployments,
        wrong types, and options that are not ours.
    """
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Refused(f"is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise Refused("is no Serve config: it must hold names and values")
    problems = list(_unknown(ServeDeploySchema, config, ""))
    if not problems:
        try:
            ServeDeploySchema.model_validate(config)
        except ValidationError as error:
            problems += [f"{_place(each['loc'])}: {each['msg']}" for each in error.errors()]
    found = []
    for number, application in enumerate(_mappings(config.get("applications"))):
        if application.get("import_path") != IMPORT_PATH:
            continue
        place = f"applications.{number}"
        for deployment in _mappings(application.get("deployments")):
            name = str(deployment.get("name"))
            if name not in DEPLOYMENTS:
                hint = did_you_mean(name, DEPLOYMENTS)
                problems.append(f"{place}.deployments: there is no {name!r}{hint}")
        try:
            found.append(ServeOptions(**(application.get("args") or {})))
        except ValidationError as error:
            for each in error.errors():
                name = _place(each["loc"])
                hint = did_you_mean(name, ServeOptions.model_fields)
                is_unknown = each["type"] == "extra_forbidden"
                problems.append(
                    f"{place}.args.{name}: {f'unknown{hint}' if is_unknown else each['msg']}"
                )
    if problems:
        raise Refused(problems)
    if not found:
        raise Refused(f"no application has import_path {IMPORT_PATH}")
    return found


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _unknown(model: type[BaseModel], given: Mapping[str, Any], place: str) -> Iterator[str]:
    """Yield what a model does not know, here and in the models inside."""
    aliases = {f.alias or name: f for name, f in model.model_fields.items()}
    known = {**model.model_fields, **aliases}
    for name, value in given.items():
        if name not in known:
            yield f"{place}{name}: unknown{did_you_mean(str(name), known)}"
            continue
        inner = next(iter(_models(known[name].annotation)), None)
        if inner is None:
            continue
        items = value if isinstance(value, list) else [value]
        for number, item in enumerate(items):
            if isinstance(item, dict):
                at = f"{place}{name}.{number}." if isinstance(value, list) else f"{place}{name}."
                yield from _unknown(inner, item, at)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for part in typing.get_args(annotation):
        yield from _models(part)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    return value


def _place(location: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in location)
