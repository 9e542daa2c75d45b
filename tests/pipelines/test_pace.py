"""A turn comes once in its time, whoever asks."""

import time
from concurrent.futures import ThreadPoolExecutor

from pipelines.pace import Every


def test_a_turn_comes_when_its_time_has_passed() -> None:
    turn = Every(0.05)
    time.sleep(0.06)
    assert turn.is_due()
    time.sleep(0.06)
    assert turn.is_due()


def test_there_is_no_turn_before() -> None:
    turn = Every(60.0)
    assert not turn.is_due()


def test_a_turn_is_one_threads() -> None:
    turn = Every(1.0)
    time.sleep(1.0)
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        turns = sum(pool.map(lambda _: turn.is_due(), range(1000)))
    assert 1 <= turns <= 1 + (time.monotonic() - started)
