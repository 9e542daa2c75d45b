"""That a worker's process keeps its memory while it computes, and gives it back between blocks."""

import platform
import subprocess
import sys

import pytest

from tests.pipelines.driving import ROOT

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")

# As a layer does, in a thread as the engine's: several tensors at a time.
PROGRAM = """
import resource, sys, threading
from pipelines.heap import give_memory_back, keep_memory

def layer():
    tensors = [bytearray(12_000_000) for _ in range(16)]

def faults(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def compute():
    first = faults(layer)
    more = sum(faults(layer) for _ in range(5))
    give_memory_back()
    print(first, more, faults(layer))

if sys.argv[1] == "keep":
    keep_memory()
thread = threading.Thread(target=compute)
thread.start()
thread.join()
"""


def page_faults(how: str) -> list[int]:
    """Page faults of a first layer, of five more, and of one after memory was given back."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [int(word) for word in done.stdout.split()]


def test_pages_are_taken_once_and_given_back() -> None:
    first, more, after = page_faults("keep")
    assert more < first / 10
    assert after > first / 2


def test_glibc_alone_takes_them_again_and_again() -> None:
    first, more, _ = page_faults("leave")
    assert more > first
