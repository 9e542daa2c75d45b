"""One file a task. Every graph takes tasks from here; none is loaded before it is asked for."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.tasks.base import Task

TASKS = ("summarize", "answer", "classify", "tag", "choose", "fill", "embed")


def task_class(name: str) -> "type[Task]":
    """Return the class of a task by its name.

    Raises: KeyError for a name that is none of `TASKS`.
    """
    if name not in TASKS:
        raise KeyError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    found: type[Task] = getattr(importlib.import_module(f"pipelines.tasks.{name}"), name.title())
    return found
