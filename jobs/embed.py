"""Turn documents into vectors: `python -m jobs.embed`."""

import sys

from jobs.batch import task_command
from jobs.options import run
from pipelines.tasks.embed import Embed

embed = task_command(
    Embed,
    "Turn documents into vectors.",
    "--input papers/ --output run/ --model longformer-base-4096 --normalize",
)


def main() -> int:
    return run(embed)


if __name__ == "__main__":
    sys.exit(main())
