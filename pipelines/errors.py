"""What can end a run, and the exit code each stands for.

PipelineError
├── Refused          2   wrong usage or input refused before any work began
├── RunFailed        1   the run broke off; the same command resumes it
│   └── Stalled      1   nothing moved for the stall timeout
└── BudgetExceeded   3   more rows failed than `max_errors` allows
"""

from collections.abc import Sequence


class PipelineError(Exception):
    """Base of everything a pipeline raises on purpose."""

    exit_code = 1


class Refused(PipelineError):
    """Work did not begin; `problems` lists every reason found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunFailed(PipelineError):
    """The run broke off; what was written stays and the same command goes on from there."""


class Stalled(RunFailed):
    """Nothing moved for the stall timeout."""


class BudgetExceeded(PipelineError):
    """More rows failed than the error budget allows."""

    exit_code = 3
