"""A worker's process keeps its memory while it computes, and gives it back when it is told to."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping

import pytest

from pipelines.batch.heap import KEEP_MEMORY
from tests.pipelines.driving import ROOT

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")

# As a layer does, in a thread as the engine's: several tensors at a time.
PROGRAM = """
import resource, threading
from pipelines.batch.heap import give_memory_back

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


def test_pages_are_taken_once_and_given_back() -> None:
    first, more, after = page_faults(KEEP_MEMORY)
    assert more < first / 10
    assert after > first / 2


def test_glibc_alone_takes_them_again_and_again() -> None:
    first, more, _ = page_faults({})
    assert more > first
