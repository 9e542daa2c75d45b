"""Summarize a corpus: `python -m jobs.summarize`."""

import sys

from jobs.batch import task_command
from jobs.options import run
from pipelines.tasks.summarize import Summarize

summarize = task_command(
    Summarize,
    "Summarize documents: an LED writes, an encoder quotes key sentences.",
    "--input corpus/ --output run/ --model led-base-16384 --num-beams 4",
)


def main() -> int:
    return run(summarize)


if __name__ == "__main__":
    sys.exit(main())
