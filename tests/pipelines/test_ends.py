"""How a run ends when somebody or something ends it: signals, a stall, a process taken over."""

import json
import signal
import time
from pathlib import Path
from typing import Any

from tests.pipelines.driving import Trial, summaries, wait_for


def test_signals_then_the_rest(trial: Trial, undisturbed: dict[str, str]) -> None:
    """SIGTERM, then SIGINT to the resumed run, then the rest, with the plan of both kinds read."""
    output = Path(trial.output)
    committed = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        driver = trial.start()
        enough = committed + 3
        wait_for(lambda enough=enough: trial.num_committed() >= enough, "three more blocks")
        sent = time.monotonic()
        driver.process.send_signal(number)
        wait_for(lambda: status(output)["status"] == "cancelled", "the status", 3.0)
        assert driver.wait() == 128 + number, trial.said()
        assert time.monotonic() - sent < 10.0
        assert number.name in status(output)["message"]
        assert not (output / "_owner.json").exists()
        committed = trial.num_committed()
    # The signals came at any moment: what was half written then must not be there twice now.
    trial.here()
    assert summaries(output) == undisturbed
    assert status(output)["attempt"] == 3
    first_run = operators(output, attempt=1)
    assert [name.split("->")[0] for name in first_run] == [
        "Input",
        "ReadCorpus",
        "MapBatches(Tokenize)",
        "MapBatches(Generate)",
        "Write",
    ]
    resume = operators(output, attempt=3)
    assert resume == [*first_run[:2], "CheckpointFilter", *first_run[2:]]


def test_a_run_in_which_nothing_moves_fails_and_says_what_waits(trial: Trial) -> None:
    output = Path(trial.output)
    trial.arguments["limit"] = 16
    # In a process of its own: it leaves a worker asleep.
    stalled = trial.start(task=trial.arguments["task"] | {"slow_s": 60.0}, stall_timeout_s=15.0)
    assert stalled.wait() == 1, trial.said()
    assert status(output)["status"] == "failed"
    message = status(output)["message"]
    assert message.startswith("nothing moved for"), message
    assert "MapBatches(Generate): 2 running" in message, message
    assert "CPU" in message, message
    assert message in trial.log.read_text()
    trial.here()
    assert len(summaries(output)) == 16


def status(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "status.json").read_text()))


def operators(output: Path, *, attempt: int) -> list[str]:
    """The operators of an attempt, from the metrics it wrote."""
    lines = (output / "metrics" / f"{attempt}-0.jsonl").read_text().splitlines()
    return [operator["name"] for operator in json.loads(lines[-1])["operators"]]
