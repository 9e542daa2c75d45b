"""Decisions of the batch graph that need no cluster: budget, room, the words of an error."""

import shutil
from pathlib import Path

import pytest
import ray
from ray.data.exceptions import SystemException

from pipelines.batch.driver import allowed_failures, root_cause
from pipelines.errors import Refused
from pipelines.storage import check_room, locate


@pytest.mark.parametrize(
    ("given", "num_rows", "allowed"),
    [
        ("0", 1000, 0),
        ("7", 5, 7),
        (" 7 ", 5, 7),
        ("1%", 99, 0),
        ("1%", 100, 1),
        ("1%", 199, 1),
        ("0%", 10**9, 0),
        ("100%", 12345, 12345),
        ("0.5 %", 1000, 5),
        # As written, not as floating point has it: 68.99999999999999.
        ("2.3%", 3000, 69),
        ("64.6%", 500, 323),
    ],
)
def test_the_error_budget(given: str, num_rows: int, allowed: int) -> None:
    assert allowed_failures(given, num_rows) == allowed


@pytest.mark.parametrize("given", ["", "%", "-1", "-1%", "101%", "nan%", "inf%", "1.5", "some"])
def test_budgets_that_are_none(given: str) -> None:
    with pytest.raises(Refused, match="--max-errors"):
        allowed_failures(given, 100)


def test_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    output = locate(str(tmp_path / "not" / "there" / "yet"))
    assert check_room(output, 1000) == []
    (problem,) = check_room(output, 1001)
    assert problem == f"{output}: 1,000 bytes free, the output may need 1,001"


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_the_words_of_an_error() -> None:
    plain = OSError(28, "No space left on device")
    assert root_cause(plain) == "OSError: [Errno 28] No space left on device"
    assert root_cause(chained(RuntimeError("outer"), plain)) == root_cause(plain)
    # What Ray adds to every error that it does not blame on user code says nothing.
    assert root_cause(chained(ValueError("why"), SystemException())) == "ValueError: why"
    task = ray.exceptions.RayTaskError("f", "Traceback\n  remote\nOSError: full", plain)
    assert root_cause(task) == root_cause(plain)
    died = ray.exceptions.RayError(
        "The actor died.\nTraceback:\n  File x\nmodule.MyError: the reason\n"
    )
    assert root_cause(chained(died, SystemException())) == "module.MyError: the reason"
    assert root_cause(ValueError()) == "ValueError: "
