"""A worker's process: its heap, who computes in it, and what is done only every so often."""

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from pipelines.batch import worker_process
from pipelines.batch.worker_process import KEEP_MEMORY, ReadWriteLock, Throttle
from tests.pipelines.driving import ROOT

glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")

# As a layer does, in a thread as the engine's: several tensors at a time.
PROGRAM = """
import resource, threading
from pipelines.batch.worker_process import give_memory_back

def layer():
    tensors = [bytearray(megabytes * 10**6) for megabytes in (12, 25, 25, 100) * 4]

def faults(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def compute():
    first = faults(layer)
    more = sum(faults(layer) for _ in range(5))
    give_memory_back()
    print(first, more, faults(layer))

thread = threading.Thread(target=compute)
thread.start()
thread.join()
"""


def page_faults(settings: Mapping[str, str]) -> list[int]:
    """Page faults of a first layer, of five more, and of one after memory was given back."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | settings,
        check=True,
        capture_output=True,
        text=True,
    )
    return [int(word) for word in done.stdout.split()]


@glibc_only
def test_pages_are_taken_once_and_given_back() -> None:
    first, more, after = page_faults(KEEP_MEMORY)
    assert more < first / 10
    assert after > first / 2


@glibc_only
def test_glibc_alone_takes_them_again_and_again() -> None:
    first, more, _ = page_faults({})
    assert more > first


# --- who computes ---


def test_many_read_at_once() -> None:
    lock, meeting = ReadWriteLock(), threading.Barrier(3, timeout=10.0)

    def read() -> None:
        with lock.read():
            meeting.wait()

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(read) for _ in range(3)]:
            done.result()


def test_a_writer_is_alone_whoever_comes() -> None:
    lock = ReadWriteLock()
    inside: list[str] = []
    seen: list[tuple[str, list[str]]] = []

    def visit(name: str) -> None:
        with lock.write() if name.startswith("write") else lock.read():
            inside.append(name)
            time.sleep(0.001)
            seen.append((name, list(inside)))
            inside.remove(name)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(visit, f"{k} {i}") for i in range(40) for k in ("write", "read")]:
            done.result()
    assert len(seen) == 80
    assert all(others == [name] for name, others in seen if name.startswith("write"))
    assert not any("write" in other for name, others in seen for other in others if other != name)


def test_a_writer_that_waits_is_next() -> None:
    lock, leave, order = ReadWriteLock(), threading.Event(), []

    def write() -> None:
        with lock.write():
            order.append("write")

    def late() -> None:
        with lock.read():
            order.append("late")

    with ThreadPoolExecutor(2) as pool:
        with lock.read():
            first = pool.submit(write)
            time.sleep(0.05)
            second = pool.submit(late)
            assert not leave.wait(0.1)
            assert order == [], "a reader overtook the writer"
        first.result(timeout=10.0)
        second.result(timeout=10.0)
    assert order == ["write", "late"]


def test_a_lock_is_left_by_an_error_too() -> None:
    lock = ReadWriteLock()
    for enter in (lock.read, lock.write, lock.read):
        with pytest.raises(KeyError), enter():
            raise KeyError
    with lock.write():
        pass


# --- now and then ---


def test_a_turn_comes_when_its_time_has_passed_since_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([100.0, 100.0, 109.0, 110.0, 110.0, 112.0, 119.0, 123.0, 131.0, 133.0])
    monkeypatch.setattr(worker_process, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    turn = Throttle(10.0)
    due = [turn.is_due() for _ in range(9)]
    assert due == [False, False, True, False, False, False, True, False, True]


def test_a_turn_is_one_threads() -> None:
    turn = Throttle(1.0)
    time.sleep(1.0)
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        turns = sum(pool.map(lambda _: turn.is_due(), range(1000)))
    assert 1 <= turns <= 1 + (time.monotonic() - started)
