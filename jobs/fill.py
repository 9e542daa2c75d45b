"""Fill every <mask> of documents: `python -m jobs.fill`."""

import sys

from jobs.batch import task_command
from jobs.options import run
from pipelines.tasks.fill import Fill

fill = task_command(
    Fill,
    "Fill every <mask> of documents.",
    "--input cloze/ --output run/ --model longformer-base-4096 --top-k 3",
)


def main() -> int:
    return run(fill)


if __name__ == "__main__":
    sys.exit(main())
