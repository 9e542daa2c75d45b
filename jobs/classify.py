"""Classify documents: one label, several, or a number: `python -m jobs.classify`."""

import sys

from jobs.batch import task_command
from jobs.options import run
from pipelines.tasks.classify import Classify

classify = task_command(
    Classify,
    "Classify documents: one label, several, or a number.",
    "--input mail/ --output run/ --model longformer-classifier --on-long windows",
)


def main() -> int:
    return run(classify)


if __name__ == "__main__":
    sys.exit(main())
