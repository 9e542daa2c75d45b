"""Choose the answer that fits a document best: `python -m jobs.choose`."""

import sys

from jobs.batch import task_command
from jobs.options import run
from pipelines.tasks.choose import Choose

choose = task_command(
    Choose,
    "Choose the answer that fits a document best.",
    "--input exams/ --output run/ --model longformer-choice --question-column question",
)


def main() -> int:
    return run(choose)


if __name__ == "__main__":
    sys.exit(main())
