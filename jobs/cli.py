"""The console script `longhaul`."""

import sys

import click

from jobs.convert import convert
from jobs.demo import demo
from jobs.options import run
from jobs.summarize import summarize


@click.group()
@click.version_option(package_name="longhaul")
def longhaul() -> None:
    """Long documents through Longformer and LED on Ray."""


longhaul.add_command(summarize)
longhaul.add_command(convert)
longhaul.add_command(demo)


def main() -> None:
    sys.exit(run(longhaul))
