"""Who lets the engine compute keeps no threads waiting: processes whose threads are all known."""

import subprocess
import sys

import pytest

BEGIN = """
import os, time, torch
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine
from longformer_core.ops.cpu.openmp import end_idle_threads
from tests.longformer_core.generation.helpers import models

def threads():
    return set(os.listdir("/proc/self/task"))

def gone(team):
    end = time.monotonic() + 10.0
    while team & threads() and time.monotonic() < end:
        time.sleep(0.01)
    return not team & threads()

torch.set_num_threads(2)
numbers = torch.randn(1000, 1000)
model = models(3)[0]
before = threads()
expected = numbers.exp()
team = threads() - before
assert team, "the operation was not parallel: nothing is tested"
"""


def run(rest: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + rest], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "what",
    [
        "end_idle_threads()",
        "engine = Engine(model)",
        "Engine(model).add([0, 5, 2], GenerationConfig(max_new_tokens=3)).result()",
    ],
)
def test_a_team_ends_and_is_made_anew(what: str) -> None:
    """Making an engine and giving it documents end the team of the thread that does it."""
    rest = f"""
{what}
print(gone(team), torch.get_num_threads())
assert torch.equal(numbers.exp(), expected)
print(len(threads() - before) >= 1)
"""
    assert run(rest).split() == ["True", "2", "True"]


def test_giving_documents_alone_ends_the_team() -> None:
    rest = """
engine = Engine(model)
numbers.exp()
team = threads() - before
assert team
handle = engine.add([0, 5, 2], GenerationConfig(max_new_tokens=3))
print(gone(team))
assert handle.result().error is None
"""
    assert run(rest) == "True"
