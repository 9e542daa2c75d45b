"""Answer a question about each document with a span of its text: `python -m jobs.answer`."""

import sys

from jobs.batch import task_command
from jobs.options import run
from pipelines.tasks.answer import Answer

answer = task_command(
    Answer,
    "Answer a question about each document with a span of its text.",
    "--input cuad/ --output run/ --model longformer-qa --question-column question",
)


def main() -> int:
    return run(answer)


if __name__ == "__main__":
    sys.exit(main())
