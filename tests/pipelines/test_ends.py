"""How a run ends when somebody or something ends it: signals, a stall, a process taken over."""

import json
import signal
import time
from pathlib import Path
from typing import Any

from tests.pipelines.drive import drive
from tests.pipelines.driving import Driver, num_committed, summaries, wait_for


def test_signals_then_the_rest(
    place: tuple[Path, Path, Path],
    corpus: Path,
    led_directory: Path,
    undisturbed: dict[str, str],
) -> None:
    """SIGTERM, then SIGINT to the resumed run, then the rest, with the plan of both kinds read."""
    output, _, log = place
    arguments: dict[str, Any] = {
        "corpus": str(corpus),
        "output": str(output),
        "model": str(led_directory),
        "task": {"slow_s": 0.02},
    }
    committed = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        driver = Driver(log, **arguments)
        enough = committed + 3
        wait_for(lambda enough=enough: num_committed(output) >= enough, "three more blocks")
        sent = time.monotonic()
        driver.process.send_signal(number)
        wait_for(lambda: status(output)["status"] == "cancelled", "the status", 3.0)
        assert driver.wait() == 128 + number, log.read_text()[-2000:]
        assert time.monotonic() - sent < 10.0
        assert number.name in status(output)["message"]
        assert not (output / "_owner.json").exists()
        committed = num_committed(output)
    # The signals came at any moment: what was half written then must not be there twice now.
    drive(**arguments)
    assert summaries(output) == undisturbed
    assert status(output)["attempt"] == 3
    first_run = operators(output, attempt=1)
    assert [name.split("->")[0] for name in first_run] == [
        "Input",
        "ReadParquet",
        "MapBatches(Tokenize)",
        "MapBatches(Generate)",
        "Write",
    ]
    resume = operators(output, attempt=3)
    assert resume == [*first_run[:2], "CheckpointFilter", *first_run[2:]]


def status(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "status.json").read_text()))


def operators(output: Path, *, attempt: int) -> list[str]:
    """The operators of an attempt, from the metrics it wrote."""
    lines = (output / "metrics" / f"{attempt}-0.jsonl").read_text().splitlines()
    return [operator["name"] for operator in json.loads(lines[-1])["operators"]]


def test_a_run_in_which_nothing_moves_fails_and_says_what_waits(
    place: tuple[Path, Path, Path], corpus: Path, led_directory: Path
) -> None:
    output, _, log = place
    arguments: dict[str, Any] = {
        "corpus": str(corpus),
        "output": str(output),
        "model": str(led_directory),
        "limit": 16,
    }
    stalled = Driver(log, **arguments, task={"slow_s": 60.0}, stall_timeout_s=15.0)
    assert stalled.wait() == 1, log.read_text()[-2000:]
    assert status(output)["status"] == "failed"
    message = status(output)["message"]
    assert message.startswith("nothing moved for"), message
    assert "MapBatches(Generate): 2 running" in message, message
    assert "CPU" in message, message
    assert message in log.read_text()
    assert Driver(log, **arguments).wait() == 0, log.read_text()[-2000:]
    assert len(summaries(output)) == 16
