"""Serve a model over HTTP: `python -m jobs.serve`."""

import json
import logging
import os
import secrets
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import BaseModel, ConfigDict, Field

from jobs.options import click_options, config_option, read_options, run
from pipelines.cluster import connect, has_gpu, num_cores
from pipelines.serve.keys import KeyFile, hash_key
from pipelines.serve.options import ServeOptions, check_free, check_open, make_task

# Ray Serve is imported where it is used: no other command waits for that.

_EXAMPLES = {
    "summarize": {"inputs": "A long document."},
    "classify": {"inputs": "A long document."},
    "tag": {"inputs": "A long document."},
    "answer": {"inputs": {"question": "What?", "context": "A long document."}},
    "fill": {"inputs": "A long <mask>."},
    "embed": {"inputs": "A long document."},
    "choose": {"inputs": {"prompt": "A long document.", "choices": ["one", "two"]}},
}


class PlaceOptions(BaseModel):
    """Where a server listens, and on which cluster it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="The address to listen on.")
    port: Annotated[int, Field(ge=1)] = 8000
    address: str | None = Field(
        None, description="A Ray cluster. Default: RAY_ADDRESS, else our own."
    )
    insecure: bool = Field(False, description="Let others in without keys.")


def _print_check(context: click.Context, _: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    from pipelines.serve.config import check_config

    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    for options in check_config(text):
        if Path(options.model).expanduser().is_dir():
            make_task(options)
        click.echo(f"{options.public_name}: correct")
    context.exit()


def _print_key(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        key = secrets.token_urlsafe(32)
        click.echo(f"key, to be kept secret: {key}", err=True)
        click.echo(f"{hash_key(key)} NAME")
        context.exit()


def callback(print_config: bool, **given: Any) -> None:
    """Serve, or print what a cluster would."""
    given = {name: value for name, value in given.items() if value is not None}
    place = {name: given.pop(name) for name in PlaceOptions.model_fields if name in given}
    options, at = read_options(ServeOptions, given), read_options(PlaceOptions, place)
    if options.device == "auto":
        device = "cuda" if has_gpu(at.address) else "cpu"
        options = options.model_copy(update={"device": device})
    if print_config:
        from pipelines.serve.config import write_config

        click.echo(write_config(options, at.host, at.port), nl=False)
        return
    run_server(options, at)


def run_server(options: ServeOptions, at: PlaceOptions) -> None:
    """Serve until somebody ends it; requests that were begun are answered."""
    from pipelines.serve.running import environment, serving

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    check_open(options, at.host, insecure=at.insecure)
    if not (at.address or "RAY_ADDRESS" in os.environ):
        check_free(at.host, at.port)
    if options.keys_file:
        KeyFile(options.keys_file)
        options = options.model_copy(update={"keys_file": str(Path(options.keys_file).absolute())})
    task = make_task(options)
    ended = threading.Event()
    before = {name: signal.signal(name, lambda *_: ended.set()) for name in _SIGNALS}
    try:
        with environment(), connect(at.address) as cluster:
            # Ray has a handler of its own by now.
            for name in _SIGNALS:
                signal.signal(name, lambda *_: ended.set())
            if options.threads is None and cluster.embedded:
                threads = max(1, num_cores() // options.most_replicas)
                options = options.model_copy(update={"threads": threads})
            click.echo(f"loading {options.public_name} ({task.name}) ...", err=True)
            with serving(options, at.host, at.port) as url:
                _print_welcome(url, task.name, options)
                ended.wait()
                click.echo("ending; requests that were begun are answered ...", err=True)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _print_welcome(url: str, task: str, options: ServeOptions) -> None:
    key = " -H 'authorization: Bearer KEY'" if options.keys_file else ""
    body = json.dumps(_EXAMPLES[task])
    click.echo(f"serving {options.public_name} at {url} (try it: {url}/playground, {url}/docs)")
    if not options.keys_file:
        click.echo("no key is asked for; --keys-file asks for one")
    click.echo(f"curl {url}/{key} -H 'content-type: application/json' -d '{body}'")


serve = click.Command(
    "serve",
    callback=callback,
    params=[
        *click_options(ServeOptions, PlaceOptions),
        click.Option(
            ["--print-config"],
            is_flag=True,
            help="Print Serve's YAML for a cluster (serve deploy) and stop.",
        ),
        click.Option(
            ["--check"],
            metavar="FILE",
            is_eager=True,
            expose_value=False,
            callback=_print_check,
            help="Check such a YAML, - for the standard input, and stop.",
        ),
        click.Option(
            ["--new-key"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_key,
            help="Make a key, print the line of a keys file for it, and stop.",
        ),
        config_option(),
    ],
    help=(
        "Serve a model over HTTP, in the shapes of Hugging Face and OpenAI.\n\n\b\nExample:\n"
        "  longhaul serve --model led-base-16384\n\n"
        "Starts a Ray cluster of its own on this machine unless it is given one, prints the URL, "
        "and ends with Ctrl-C when the requests that were begun are answered."
    ),
)


def main() -> int:
    return run(serve)


if __name__ == "__main__":
    sys.exit(main())
