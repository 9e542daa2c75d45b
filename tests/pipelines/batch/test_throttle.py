"""A turn comes once in its time, whoever asks."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from pipelines.batch.throttle import Every

from pipelines.batch import throttle


def test_a_turn_comes_when_its_time_has_passed_since_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([100.0, 100.0, 109.0, 110.0, 110.0, 112.0, 119.0, 123.0, 131.0, 133.0])
    monkeypatch.setattr(throttle, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    turn = Every(10.0)
    due = [turn.is_due() for _ in range(9)]
    assert due == [False, False, True, False, False, False, True, False, True]


def test_a_turn_is_one_threads() -> None:
    turn = Every(1.0)
    time.sleep(1.0)
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        turns = sum(pool.map(lambda _: turn.is_due(), range(1000)))
    assert 1 <= turns <= 1 + (time.monotonic() - started)
