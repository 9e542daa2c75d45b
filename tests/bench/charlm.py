"""A character language model on causal windows, trained on books, byte by byte.

    LONGHAUL_TEST_DATA=<folder> python -m tests.bench.charlm [--minutes 15] [--dilated]

Four layers of width 256 with the paper's schedule, windows that double with depth and, with
--dilated, two dilated heads in the upper layers; 256 bytes of context. Reads the first bytes of
`charlm/books8.gz` in the folder; the last of them are held back. Prints a JSON line now and then:
steps, CPU minutes, and bits per byte, in training and on the bytes held back.
"""

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longformer_core.config import LongformerCausalConfig
from longformer_core.models.longformer_causal import LongformerForCausalLM
from tests.helpers import data_folder

CONTEXT, BATCH = 256, 8
NUM_BYTES, NUM_HELD_BACK = 16_000_000, 200_000
PEAK_RATE, LAST_SHARE, WARM_UP_STEPS = 2e-3, 0.05, 50


def read_bytes(folder: Path) -> Tensor:
    with gzip.open(folder / "charlm" / "books8.gz") as stream:
        return torch.frombuffer(bytearray(stream.read(NUM_BYTES)), dtype=torch.uint8)


def make_model(*, is_dilated: bool) -> LongformerForCausalLM:
    config = LongformerCausalConfig.with_schedule(
        smallest_window=32,
        largest_window=256,
        is_dilated=is_dilated,
        vocab_size=256,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-5,
    )
    return LongformerForCausalLM(config)


def draw_batch(text: Tensor, generator: torch.Generator) -> Tensor:
    """[B, CONTEXT + 1]: each byte but the first is guessed from those before it."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)].long()


@torch.inference_mode()
def bits_per_byte(model: LongformerForCausalLM, text: Tensor, num_batches: int) -> float:
    """The mean over windows spread evenly over the text; the first byte of each is given."""
    model.eval()
    starts = torch.linspace(0, len(text) - CONTEXT - 1, num_batches * BATCH).long()[:, None]
    windows = text[starts + torch.arange(CONTEXT + 1)].long()
    losses = [float(model(ids, labels=ids).loss) for ids in windows.split(BATCH)]
    model.train()
    return sum(losses) / len(losses) / math.log(2)


def rate(step: int, share: float) -> float:
    """The learning rate: a short rise, then a cosine over the share of time that is spent."""
    falling = LAST_SHARE + (1 - LAST_SHARE) * (1 + math.cos(math.pi * min(share, 1))) / 2
    return PEAK_RATE * min(1, (step + 1) / WARM_UP_STEPS) * falling


def train(
    text: Tensor, minutes: float, *, is_dilated: bool, every: int = 50, below: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Train for so many CPU minutes, or until the bytes held back take fewer bits than `below`."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = make_model(is_dilated=is_dilated).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    seen, held_back = text[:-NUM_HELD_BACK], text[-NUM_HELD_BACK:]
    started, step, share = time.process_time(), 0, 0.0
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, share)
        ids = draw_batch(seen, generator)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        spent = (time.process_time() - started) / 60
        share = spent / minutes
        if step % every and share < 1:
            continue
        bits = bits_per_byte(model, held_back, 8)
        yield {
            "dilated": is_dilated,
            "step": step,
            "cpu_minutes": round(spent, 2),
            "train_bits_per_byte": round(float(loss.detach()) / math.log(2), 3),
            "held_back_bits_per_byte": round(bits, 3),
        }
        if bits < below:
            return


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--dilated", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    folder = data_folder()
    if folder is None:
        parser.error("set LONGHAUL_TEST_DATA to the folder of the corpora")
    torch.set_num_threads(given.threads)
    for line in train(read_bytes(folder), given.minutes, is_dilated=given.dilated):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
