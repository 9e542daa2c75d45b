"""Find the entities of documents, with where they stand: `python -m jobs.tag`."""

import sys

from jobs.batch import task_command
from jobs.options import run
from pipelines.tasks.tag import Tag

tag = task_command(
    Tag,
    "Find the entities of documents, with where they stand.",
    "--input books/ --output run/ --model longformer-ner --aggregation first",
)


def main() -> int:
    return run(tag)


if __name__ == "__main__":
    sys.exit(main())
