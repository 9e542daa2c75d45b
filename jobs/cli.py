"""The console script `longhaul`."""

import sys

import click

from jobs.answer import answer
from jobs.choose import choose
from jobs.classify import classify
from jobs.convert import convert
from jobs.demo import demo
from jobs.embed import embed
from jobs.evaluate import evaluate
from jobs.fill import fill
from jobs.options import run
from jobs.retry import retry
from jobs.serve import serve
from jobs.summarize import summarize
from jobs.tag import tag


@click.group()
@click.version_option(package_name="longhaul")
def longhaul() -> None:
    """Long documents through Longformer and LED on Ray."""


for command in (
    summarize,
    answer,
    classify,
    tag,
    choose,
    fill,
    embed,
    evaluate,
    retry,
    convert,
    serve,
    demo,
):
    longhaul.add_command(command)


def main() -> None:
    sys.exit(run(longhaul))
