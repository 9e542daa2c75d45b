"""Blocks that run at once in one worker: who is inside with whom, and whose seconds count."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.batch.overlap import Room, Stopwatch


def test_many_share_a_room() -> None:
    room, meeting = Room(), threading.Barrier(3, timeout=10.0)

    def share() -> None:
        with room.shared():
            meeting.wait()

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(share) for _ in range(3)]:
            done.result()


def test_alone_is_alone_whoever_comes() -> None:
    room = Room()
    inside: list[str] = []
    seen: list[tuple[str, list[str]]] = []

    def visit(name: str) -> None:
        with room.alone() if name.startswith("alone") else room.shared():
            inside.append(name)
            time.sleep(0.001)
            seen.append((name, list(inside)))
            inside.remove(name)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(visit, f"{k} {i}") for i in range(40) for k in ("alone", "share")]:
            done.result()
    assert len(seen) == 80
    assert all(others == [name] for name, others in seen if name.startswith("alone"))
    assert not any("alone" in other for name, others in seen for other in others if other != name)


def test_who_wants_to_be_alone_is_next() -> None:
    room, leave, order = Room(), threading.Event(), []

    def alone() -> None:
        with room.alone():
            order.append("alone")

    def late() -> None:
        with room.shared():
            order.append("late")

    with ThreadPoolExecutor(2) as pool:
        with room.shared():
            first = pool.submit(alone)
            time.sleep(0.05)
            second = pool.submit(late)
            assert not leave.wait(0.1)
            assert order == [], "somebody came in before the one who waits to be alone"
        first.result(timeout=10.0)
        second.result(timeout=10.0)
    assert order == ["alone", "late"]


def test_a_room_is_left_by_an_error_too() -> None:
    room = Room()
    for enter in (room.shared, room.alone, room.shared):
        with pytest.raises(KeyError), enter():
            raise KeyError
    with room.alone():
        pass


@pytest.mark.parametrize(
    ("moments", "told"),
    [
        # + starts, - stops, at these seconds.
        ([(0, "+"), (10, "-")], [10]),
        ([(0, "+"), (5, "+"), (10, "-"), (12, "-")], [10, 2]),
        ([(0, "+"), (2, "+"), (5, "-"), (10, "-")], [5, 5]),
        ([(0, "+"), (1, "-"), (50, "+"), (53, "-")], [1, 3]),
        ([(0, "+"), (0, "+"), (4, "-"), (4, "+"), (4, "-"), (9, "-")], [4, 0, 5]),
    ],
)
def test_overlapping_seconds_count_once(
    moments: list[tuple[int, str]], told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopwatch, seconds = Stopwatch(), []
    for moment, what in moments:
        monkeypatch.setattr(time, "monotonic", lambda moment=moment: 1000.0 + moment)
        if what == "+":
            stopwatch.start()
        else:
            seconds.append(stopwatch.stop())
    assert seconds == told
