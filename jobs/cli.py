"""The console script `longhaul`."""

import sys

import click

from jobs.options import run
from jobs.summarize import summarize


@click.group()
@click.version_option(package_name="longhaul")
def longhaul() -> None:
    """Long documents through Longformer and LED on Ray."""


longhaul.add_command(summarize)


def main() -> None:
    sys.exit(run(longhaul))
