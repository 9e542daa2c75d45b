"""A training step against transformers: Longformer-base, masked words, 4096 tokens.

    python -m tests.bench.training [--rounds 3] [--threads 2] [--tokens 4096]
        [--device cpu|cuda] [--dtype float32|bfloat16] [--batch-sizes 1 2 4 8]

Dropout 0.1 on both sides, also of attention probabilities, the first token global, weights in
`--dtype`. Loss and gradients are compared first, without dropout; then forward and backward take
turns, each side at the best of the batch sizes, and the memory that lives beside weights and
gradients is measured once for each, at transformers' batch size.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from longformer_core import LongformerConfig, LongformerForMaskedLM
from tests.bench.encoder import padded
from tests.bench.measure import (
    best_per_document,
    device_name,
    distance,
    emit,
    peak_bytes_on,
    waited_for,
)
from tests.helpers import LONGFORMER_BASE

# By device: ratio of speeds, of memory.
GOALS = {"cpu": (2.0, 0.5), "cuda": (3.0, 1 / 3)}
BATCH_SIZES = {"cpu": [1], "cuda": [1, 2, 4, 8]}
# How far losses and gradients may be apart, as shares.
TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (2e-2, 2e-1)}


def step(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        loss: Tensor = model(**inputs).loss
        loss.backward()
        return loss.detach()

    return waited_for(run, inputs["input_ids"].device.type)


def compare(published: Any, ours: Any, inputs: dict[str, Tensor], dtype: str) -> None:
    loss_limit, limit = TOLERANCE[dtype]
    expected, got = step(published.eval(), inputs)(), step(ours.eval(), inputs)()
    apart = distance(got, expected)
    assert apart < loss_limit, f"the losses are {apart} apart: no speed is printed"
    theirs = dict(published.named_parameters())
    for name, parameter in ours.named_parameters():
        oracle = theirs[name].grad
        if oracle is not None and oracle.norm() > 1e-4:
            error = distance(parameter.grad, oracle)
            assert error < limit, f"{name} is {error} apart: no speed is printed"


def batch(given: argparse.Namespace, size: int) -> dict[str, Tensor]:
    inputs = padded((given.tokens,) * size)
    is_masked = torch.rand(inputs["input_ids"].shape) < 0.15
    inputs["labels"] = inputs["input_ids"].masked_fill(~is_masked, -100)
    return {name: x.to(given.device) for name, x in inputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", choices=list(GOALS), default="cpu")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    published = transformers.LongformerForMaskedLM(transformers.LongformerConfig(**LONGFORMER_BASE))
    ours = LongformerForMaskedLM(LongformerConfig(**LONGFORMER_BASE))
    ours.load_state_dict(published.state_dict())
    for model in (published, ours):
        model.to(given.device, getattr(torch, given.dtype))
    compare(published, ours, batch(given, 1), given.dtype)
    published.train()
    ours.train()

    def calls(size: int) -> dict[str, Callable[[], Any]]:
        inputs = batch(given, size)
        return {"transformers": step(published, inputs), "ours": step(ours, inputs)}

    sizes = given.batch_sizes or BATCH_SIZES[given.device]
    best = best_per_document(calls, sizes, given.rounds)
    same = calls(best["transformers"][0])
    memory = {name: peak_bytes_on(given.device, call) for name, call in same.items()}
    goal, memory_goal = GOALS[given.device]
    emit(
        "training",
        "masked-lm",
        device=device_name(given.device),
        dtype=given.dtype,
        tokens=given.tokens,
        rounds=given.rounds,
        batch_size=best["ours"][0],
        transformers_batch_size=best["transformers"][0],
        transformers_over_ours=best["transformers"][1] / best["ours"][1],
        goal=goal,
        peak_bytes=memory["ours"],
        transformers_peak_bytes=memory["transformers"],
        memory_ratio=memory["ours"] / memory["transformers"],
        memory_goal=memory_goal,
    )


if __name__ == "__main__":
    main()
