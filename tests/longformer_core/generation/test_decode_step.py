"""Recorded steps give what steps one by one give, whatever comes and goes between them."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from longformer_core.generation import decode_step as stepper
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.decode_step import DecodeStep
from longformer_core.generation.engine import Engine
from longformer_core.generation.request import Generation, GenerationHandle, Request
from longformer_core.generation.running_batch import RunningBatch
from tests.longformer_core.generation.helpers import documents, models

TEXTS = documents(3, 40, 7, 61, 25, 33)
LONG: dict[str, Any] = {"max_new_tokens": 38, "min_new_tokens": 20}
OPTIONS = {
    "greedy": GenerationConfig(**LONG, no_repeat_ngram_size=3),
    "beams": GenerationConfig(**LONG, num_beams=3, length_penalty=2.0),
    "sampling": GenerationConfig(**LONG, do_sample=True, num_return_sequences=2),
    "lookup": GenerationConfig(**LONG, prompt_lookup_num_tokens=3),
}
SEEDS = list(range(len(TEXTS)))
# What makes the host wait, which nothing may do while a GPU records.
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")


class Tape(TorchDispatchMode):
    """What a GPU does when it records: note every operation, and change nothing.

    A replay runs the same operations on the same memory; whatever the recorded code read from
    Python stays as it was. Only what is computed from `checked` alone may be looked at.
    """

    def __init__(self, checked: Tensor) -> None:
        super().__init__()
        self._seen = {id(checked)}
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        is_seen = bool(given) and all(id(value) in self._seen for value in given)
        name = func._schema.name.removeprefix("aten::")
        assert is_seen or name not in WAITS, f"{name} waits for the device"
        if func._schema.is_mutable:
            for value in given:
                memory = value.untyped_storage()
                self._before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        out = func(*args, **kwargs or {})
        self._seen |= {id(value) for value in tree_leaves(out) if is_seen}
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def undo(self) -> None:
        for memory, before in self._before.values():
            memory.copy_(before)

    def run(self, result: Tensor) -> None:
        """Run what was noted, and write what `result` becomes into it."""
        now: dict[int, Tensor] = {}
        for func, args, kwargs, old in self.calls:
            args, kwargs = tree_map(lambda x: now.get(id(x), x), (args, kwargs))
            new = func(*args, **kwargs)
            for one, other in zip(tree_leaves(old), tree_leaves(new), strict=True):
                if isinstance(one, Tensor):
                    now[id(one)] = other
        result.copy_(now[id(result)])


class Recorder:
    """Records on the CPU, and counts."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.count["recorded"] += 1
        own: Any = step
        tape = Tape(own.__self__._positions)
        with tape:
            logits = step()
        tape.undo()

        def replay() -> None:
            self.count["replayed"] += 1
            tape.run(logits)

        return replay, logits


def handles_of(options: GenerationConfig, texts: Sequence[int]) -> list[GenerationHandle]:
    return [GenerationHandle(Request(TEXTS[i], options, None, SEEDS[i])) for i in texts]


def run_to_the_end(
    batch: RunningBatch, joining: dict[int, RunningBatch] | None = None
) -> list[Generation]:
    """Step until all are done; another joins before the step with its number."""
    outcomes: dict[GenerationHandle, Generation] = {}
    order = list(batch.handles)
    step = 0
    while batch.handles:
        if joining and step in joining:
            order += joining[step].handles
            batch.extend(joining[step])
        outcomes |= dict(batch.step())
        step += 1
    return [outcomes[handle] for handle in order]


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_replayed_steps_write_the_same_texts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepper, "_STEPS_BEFORE_RECORDING", 1)
    model, options, record = models(3)[0], OPTIONS[name], Recorder()
    expected = run_to_the_end(RunningBatch(model, handles_of(options, range(5)), "auto"))

    batch = RunningBatch(model, handles_of(options, [0, 1, 2]), "auto", record)
    late = RunningBatch(model, handles_of(options, [3, 4]), "auto", record)
    found = run_to_the_end(batch, {5: late})
    assert [out.sequences for out in found] == [out.sequences for out in expected]
    assert any(len(row) > 15 for out in found for row in out.sequences), "no text is long"
    # Documents leave and join, and memory grows: each time it is recorded anew, or fails.
    assert record.count["recorded"] >= 3
    assert record.count["replayed"] > 1.5 * record.count["recorded"]


@torch.no_grad()
def test_a_replay_would_show_what_a_step_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees it when something that changes is not in memory that stays."""
    monkeypatch.setattr(stepper, "_STEPS_BEFORE_RECORDING", 1)
    options = GenerationConfig(min_new_tokens=14, max_new_tokens=14, num_beams=3)
    model = models(3)[0]
    expected = run_to_the_end(RunningBatch(model, handles_of(options, [0]), "auto"))
    batch = RunningBatch(model, handles_of(options, [0]), "auto")
    # The cache's shapes are not fixed: a replay looks at what was in use when it was recorded.
    batch._next_logits = DecodeStep(model, batch._cache, batch._source, Recorder())
    found = run_to_the_end(batch)
    assert [out.sequences for out in found] != [out.sequences for out in expected]


@torch.no_grad()
def test_documents_that_change_all_the_time_are_not_recorded() -> None:
    model, record = models(3)[0], Recorder()
    options = GenerationConfig(max_new_tokens=30, min_new_tokens=30)
    batch = RunningBatch(model, handles_of(options, [0]), "auto", record)
    for _ in range(6):
        for _ in range(3):
            batch.step()
        batch.extend(RunningBatch(model, handles_of(options, [1]), "auto", record))
    assert not record.count
    batch.remove(set(range(1, len(batch.handles))))
    for _ in range(7):
        batch.step()
    assert record.count == {"recorded": 1, "replayed": 3}


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_graphs_on_a_gpu_write_the_same_texts(name: str) -> None:
    model = models(3)[0].to("cuda")
    outcomes = []
    for cuda_graphs in (False, True):
        engine = Engine(model, cuda_graphs=cuda_graphs)
        requests = [
            Request(text, OPTIONS[name], None, seed)
            for text, seed in zip(TEXTS, SEEDS, strict=True)
        ]
        outcomes.append({i: out.sequences for i, out in engine.run(requests)})
        assert all(out for out in outcomes[-1].values())
    assert outcomes[0] == outcomes[1]
