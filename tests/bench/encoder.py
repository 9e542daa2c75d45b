"""Encoding against transformers: Longformer-base and the encoder of LED-base, untrained weights.

    python -m tests.bench.encoder [float32] [bfloat16] [short] [led] [--rounds 5] [--threads 2]

Each case runs transformers and this package in turn in one process, in one dtype, the first token
global. Outputs are compared first; then the ratio of medians, the share of the floor (the time of
the layers' matrix products alone, measured in the same rounds), and the memory beside the weights.
`short` is eight documents of 33 to 1500 tokens in one padded batch.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from longformer_core import LEDConfig, LEDModel, LongformerConfig, LongformerModel
from tests.bench.measure import alternate, distance, emit, peak_bytes
from tests.helpers import LED_BASE, LONGFORMER_BASE

SHORT = (33, 120, 250, 400, 610, 830, 1100, 1500)
# case: ratio to transformers, share of the floor
GOALS = {"float32": (2.2, 0.7), "bfloat16": (4.2, None), "short": (7.0, None), "led": (3.5, None)}


def padded(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    ids = torch.ones(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, 50000, (length,))
    marks = torch.zeros_like(ids)
    marks[:, 0] = 1
    return {"input_ids": ids, "attention_mask": ids.ne(1).long(), "global_attention_mask": marks}


def models(case: str) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """Return the published encoder, ours with the same weights, and our config."""
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    if case == "led":
        led = LED_BASE | {"decoder_layers": 1}
        published = transformers.LEDModel(transformers.LEDConfig(**led)).eval()
        ours = LEDModel(LEDConfig(**led)).eval()
        ours.load_state_dict(published.state_dict())
        return published.encoder, ours.encode_padded, ours.config
    config = transformers.LongformerConfig(**LONGFORMER_BASE)
    theirs = transformers.LongformerModel(config).to(dtype).eval()
    mine = LongformerModel(LongformerConfig(**LONGFORMER_BASE)).to(dtype).eval()
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine, mine.config


def floor(config: Any, num_tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    """The layers' matrix products, and nothing else."""
    d, f = config.hidden_size, 4 * config.hidden_size
    states = torch.randn(num_tokens, d, dtype=dtype)
    wide = torch.randn(num_tokens, f, dtype=dtype)
    square, up = torch.randn(d, d, dtype=dtype), torch.randn(d, f, dtype=dtype)
    down = torch.randn(f, d, dtype=dtype)

    def run() -> None:
        for _ in range(config.num_hidden_layers):
            for _ in range(4):
                states @ square
            states @ up
            wide @ down

    return run


def bench(case: str, rounds: int) -> None:
    torch.manual_seed(0)
    lengths = {"short": SHORT, "led": (16384,)}.get(case, (4096,))
    inputs = padded(lengths)
    published, ours, config = models(case)

    def run(model: Callable[..., Any]) -> Callable[[], Tensor]:
        @torch.no_grad()
        def encode() -> Tensor:
            states: Tensor = model(**inputs).last_hidden_state
            return states

        return encode

    theirs, mine = run(published), run(ours)
    seen = inputs["attention_mask"].bool()
    expected, got = theirs()[seen], mine()[seen]
    error, limit = distance(got, expected), 2e-2 if case == "bfloat16" else 1e-5
    assert error < limit, f"{case}: the outputs differ by {error}: no speed is printed"
    floored = floor(config, sum(lengths), got.dtype)
    median = alternate({"transformers": theirs, "ours": mine, "floor": floored}, rounds)
    ratio, share = GOALS[case]
    emit(
        "encoder",
        case,
        lengths=list(lengths),
        rounds=rounds,
        difference=error,
        transformers_over_ours=median["transformers"] / median["ours"],
        goal=ratio,
        floor_over_ours=median["floor"] / median["ours"],
        floor_goal=share,
        peak_bytes=peak_bytes(mine),
        transformers_peak_bytes=peak_bytes(theirs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(GOALS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    transformers.utils.logging.set_verbosity_error()
    for case in given.cases:
        bench(case, given.rounds)


if __name__ == "__main__":
    main()
