"""Encoding against transformers: Longformer-base and the encoder of LED-base, untrained weights.

    python -m tests.bench.encoder [float32] [bfloat16] [short] [led] [--rounds 5] [--threads 2]
        [--device cpu|cuda] [--batch-sizes 1 4 16]

Each case runs transformers and this package in turn in one process, in one dtype, the first token
global, each at the best of the batch sizes. Outputs are compared first; then the ratio of medians,
the share of the floor (the time of the layers' matrix products alone, measured in the same rounds),
and the memory beside the weights, of both at transformers' batch size. `short` is eight documents
of 33 to 1500 tokens in one padded batch.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from longformer_core import LEDConfig, LEDModel, LongformerConfig, LongformerModel
from tests.bench.measure import (
    best_per_document,
    device_name,
    distance,
    emit,
    peak_bytes_on,
    waited_for,
)
from tests.helpers import LED_BASE, LONGFORMER_BASE

SHORT = (33, 120, 250, 400, 610, 830, 1100, 1500)
LENGTHS = {"short": SHORT, "led": (16384,)}
# By device and case: ratio to transformers, share of the floor.
GOALS = {
    "cpu": {
        "float32": (2.2, 0.7),
        "bfloat16": (4.2, None),
        "short": (7.0, None),
        "led": (3.5, None),
    },
    "cuda": {"bfloat16": (3.5, 0.5)},
}
BATCH_SIZES = {"cpu": [1], "cuda": [1, 4, 16]}


def padded(lengths: tuple[int, ...], device: str = "cpu") -> dict[str, Tensor]:
    ids = torch.ones(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, 50000, (length,))
    marks = torch.zeros_like(ids)
    marks[:, 0] = 1
    inputs = {"input_ids": ids, "attention_mask": ids.ne(1).long(), "global_attention_mask": marks}
    return {name: x.to(device) for name, x in inputs.items()}


def models(case: str, device: str) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """Return the published encoder, ours with the same weights, and our config."""
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    if case == "led":
        led = LED_BASE | {"decoder_layers": 1}
        published = transformers.LEDModel(transformers.LEDConfig(**led)).to(device).eval()
        ours = LEDModel(LEDConfig(**led)).to(device).eval()
        ours.load_state_dict(published.state_dict())
        return published.encoder, ours.encode_padded, ours.config
    config = transformers.LongformerConfig(**LONGFORMER_BASE)
    theirs = transformers.LongformerModel(config).to(device, dtype).eval()
    mine = LongformerModel(LongformerConfig(**LONGFORMER_BASE)).to(device, dtype).eval()
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine, mine.config


def floor(config: Any, num_tokens: int, like: Tensor) -> Callable[[], None]:
    """The layers' matrix products, and nothing else."""
    d, f = config.hidden_size, 4 * config.hidden_size
    shapes = ((num_tokens, d), (num_tokens, f), (d, d), (d, f), (f, d))
    states, wide, square, up, down = (torch.randn_like(like.new_empty(s)) for s in shapes)

    def run() -> None:
        for _ in range(config.num_hidden_layers):
            for _ in range(4):
                states @ square
            states @ up
            wide @ down

    return run


def bench(case: str, given: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = given.device
    lengths = LENGTHS.get(case, (4096,))
    published, ours, config = models(case, device)

    def run(model: Callable[..., Any], inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
        @torch.no_grad()
        def encode() -> Tensor:
            states: Tensor = model(**inputs).last_hidden_state
            return states

        return waited_for(encode, device)

    inputs = padded(lengths, device)
    seen = inputs["attention_mask"].bool()
    expected, got = run(published, inputs)()[seen], run(ours, inputs)()[seen]
    error, limit = distance(got, expected), 2e-2 if case == "bfloat16" else 1e-5
    assert error < limit, f"{case}: the outputs differ by {error}: no speed is printed"

    def calls(batch_size: int) -> dict[str, Callable[[], Any]]:
        batch = padded(lengths * batch_size, device)
        floored = floor(config, sum(lengths) * batch_size, got)
        return {
            "transformers": run(published, batch),
            "ours": run(ours, batch),
            "floor": waited_for(floored, device),
        }

    best = best_per_document(calls, given.batch_sizes, given.rounds)
    ratio, share = GOALS[device].get(case, (None, None))
    batch_size, seconds = best["ours"]
    their_batch_size, their_seconds = best["transformers"]
    same = padded(lengths * their_batch_size, device)
    emit(
        "encoder",
        case,
        device=device_name(device),
        lengths=list(lengths),
        rounds=given.rounds,
        batch_size=batch_size,
        transformers_batch_size=their_batch_size,
        difference=error,
        transformers_over_ours=their_seconds / seconds,
        goal=ratio,
        floor_over_ours=best["floor"][1] / seconds,
        floor_goal=share,
        peak_bytes=peak_bytes_on(device, run(ours, same)),
        transformers_peak_bytes=peak_bytes_on(device, run(published, same)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=list(GOALS), default="cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    given = parser.parse_args()
    unknown = set(given.cases) - set(GOALS["cpu"])
    if unknown:
        parser.error(f"unknown: {unknown}")
    given.batch_sizes = given.batch_sizes or BATCH_SIZES[given.device]
    torch.set_num_threads(given.threads)
    transformers.utils.logging.set_verbosity_error()
    for case in given.cases or GOALS[given.device]:
        bench(case, given)


if __name__ == "__main__":
    main()
