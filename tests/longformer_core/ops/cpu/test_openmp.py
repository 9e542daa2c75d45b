"""Who lets the engine compute keeps no threads waiting: a process whose threads are all known."""

import subprocess
import sys

PROGRAM = """
import os, time, torch
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine
from longformer_core.ops.cpu.openmp import end_idle_threads
from tests.longformer_core.generation.helpers import models

def threads():
    return set(os.listdir("/proc/self/task"))

def new_team():
    before = threads()
    assert torch.equal(numbers.exp(), expected)
    team = threads() - before
    assert team, "the operation was not parallel: nothing is tested"
    return team

def gone(team):
    end = time.monotonic() + 10.0
    while team & threads() and time.monotonic() < end:
        time.sleep(0.01)
    return not team & threads()

torch.set_num_threads(1)
numbers = torch.randn(1000, 1000)
expected = numbers.exp()
model = models(3)[0]
options = GenerationConfig(max_new_tokens=3)
torch.set_num_threads(2)

team = new_team()
end_idle_threads()
assert gone(team), "end_idle_threads"
assert torch.get_num_threads() == 2

team = new_team()
engine = Engine(model)
assert gone(team), "making an engine"

team = new_team()
handle = engine.add([0, 5, 2], options)
assert gone(team), "giving it a document"
assert handle.result().error is None
assert torch.get_num_threads() == 2
new_team()
"""


def test_a_team_ends_when_the_engine_has_work_and_is_made_anew() -> None:
    """Making an engine and giving it documents end the team of the thread that does it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
