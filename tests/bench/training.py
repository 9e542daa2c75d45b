"""A training step against transformers: Longformer-base, masked words, 4096 tokens, float32.

    python -m tests.bench.training [--rounds 3] [--threads 2] [--tokens 4096]

Dropout 0.1 on both sides, also of attention probabilities, batch 1, the first token global. Loss
and gradients are compared first, without dropout; then forward and backward take turns, and the
memory that lives beside weights and gradients is measured once for each.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from longformer_core import LongformerConfig, LongformerForMaskedLM
from tests.bench.encoder import padded
from tests.bench.measure import alternate, distance, emit, peak_bytes
from tests.helpers import LONGFORMER_BASE

GOAL, MEMORY_GOAL = 2.0, 0.5


def step(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        loss: Tensor = model(**inputs).loss
        loss.backward()
        return loss.detach()

    return run


def compare(published: Any, ours: Any, inputs: dict[str, Tensor]) -> None:
    expected, got = step(published.eval(), inputs)(), step(ours.eval(), inputs)()
    assert abs(float(got - expected)) < 1e-4, "the losses differ: no speed is printed"
    theirs = dict(published.named_parameters())
    for name, parameter in ours.named_parameters():
        oracle = theirs[name].grad
        if oracle is not None and oracle.norm() > 1e-4:
            assert distance(parameter.grad, oracle) < 1e-3, f"{name}: no speed is printed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    published = transformers.LongformerForMaskedLM(transformers.LongformerConfig(**LONGFORMER_BASE))
    ours = LongformerForMaskedLM(LongformerConfig(**LONGFORMER_BASE))
    ours.load_state_dict(published.state_dict())
    inputs = padded((given.tokens,))
    is_masked = torch.rand(inputs["input_ids"].shape) < 0.15
    inputs["labels"] = inputs["input_ids"].masked_fill(~is_masked, -100)
    compare(published, ours, inputs)
    theirs, mine = step(published.train(), inputs), step(ours.train(), inputs)
    median = alternate({"transformers": theirs, "ours": mine}, given.rounds)
    memory, their_memory = peak_bytes(mine), peak_bytes(theirs)
    emit(
        "training",
        "masked-lm",
        tokens=given.tokens,
        rounds=given.rounds,
        transformers_over_ours=median["transformers"] / median["ours"],
        goal=GOAL,
        peak_bytes=memory,
        transformers_peak_bytes=their_memory,
        memory_ratio=memory / their_memory,
        memory_goal=MEMORY_GOAL,
    )


if __name__ == "__main__":
    main()
