"""Prompt lookup: steps and time of greedy decoding, with a model trained to copy leading sentences.

    LONGHAUL_TEST_DATA=<folder> python -m tests.bench.lookup [--minutes 3] [--rounds 3]

A small LED learns, on the training texts of `proposals`, to repeat the beginning of a passage. On
passages of the validation texts it then decodes with and without guessing from the source. The
texts must be the same; printed are the steps per token, and the ratio of the times.
"""

import argparse
import random
import time
from collections.abc import Sequence

import pyarrow.parquet as pq
import torch
from torch import Tensor

from longformer_core import LEDConfig, LEDForConditionalGeneration
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine
from longformer_core.generation.request import Generation, Request
from longformer_core.tokenization.tokenizer import LEDTokenizerFast
from tests.bench.measure import alternate, emit
from tests.helpers import data_folder, trained_tokenizer_directory

PASSAGE, COPIED, BATCH, GUESSES = 96, 40, 32, (2, 4, 8)


def passages(tokenizer: LEDTokenizerFast, split: str) -> list[list[int]]:
    """Cut the corpus into runs of PASSAGE tokens, in the published frame."""
    folder = data_folder()
    assert folder is not None, "set LONGHAUL_TEST_DATA"
    found = []
    for file in sorted((folder / "proposals").glob(f"{split}-*.parquet")):
        for text in pq.read_table(file, columns=["text"])["text"].to_pylist():
            ids = tokenizer.encode(text[:20_000], add_special_tokens=False)
            runs = range(0, len(ids) - PASSAGE, PASSAGE)
            found += [[0, *ids[first : first + PASSAGE - 2], 2] for first in runs]
    random.Random(0).shuffle(found)
    return found


def trained(tokenizer: LEDTokenizerFast, minutes: float) -> tuple[LEDForConditionalGeneration, int]:
    """Train until the time is up; return the model and its steps."""
    torch.manual_seed(0)
    config = LEDConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        attention_window=[16],
        max_encoder_position_embeddings=PASSAGE,
        max_decoder_position_embeddings=64,
        dropout=0.0,
    )
    model = LEDForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=100)
    texts, steps, end = passages(tokenizer, "train"), 0, time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        batch = torch.tensor(random.Random(steps).sample(texts, BATCH))
        loss = copying_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        steps += 1
        if steps % 100 == 0:
            print(f"step {steps}: loss {loss.item():.3f}", flush=True)
    return model.eval(), steps


def copying_loss(model: LEDForConditionalGeneration, batch: Tensor) -> Tensor:
    labels = torch.cat([batch[:, 1 : COPIED + 1], torch.full((len(batch), 1), 2)], 1)
    loss: Tensor = model(batch, labels=labels).loss
    return loss


class Counted:
    """A model whose steps are counted."""

    def __init__(self, model: LEDForConditionalGeneration) -> None:
        self._model = model
        self.steps = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def decode_step(self, *given: Tensor) -> Tensor:
        self.steps += 1
        return self._model.decode_step(*given)  # type: ignore[arg-type]


def decode(
    model: LEDForConditionalGeneration, texts: Sequence[list[int]], guesses: int | None
) -> tuple[list[Generation], int]:
    """Decode one document after the other, and count the steps."""
    counted = Counted(model)
    engine = Engine(counted)  # type: ignore[arg-type]
    options = GenerationConfig(
        max_new_tokens=COPIED + 8, prompt_lookup_num_tokens=guesses, max_matching_ngram_size=3
    )
    found = []
    for text in texts:
        found += [outcome for _, outcome in engine.run([Request(text, options)])]
    return found, counted.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = LEDTokenizerFast.from_pretrained(trained_tokenizer_directory())
    model, steps = trained(tokenizer, given.minutes)
    texts = passages(tokenizer, "validation")[: given.documents]
    plain, plain_steps = decode(model, texts, None)
    copied = [
        sum(a == b for a, b in zip(text[1:], out.sequences[0], strict=False)) / COPIED
        for text, out in zip(texts, plain, strict=True)
    ]
    for guesses in GUESSES:
        quick, quick_steps = decode(model, texts, guesses)
        same = [a.sequences == b.sequences for a, b in zip(plain, quick, strict=True)]
        assert all(same), f"{same.count(False)} texts are not the same: no speed is printed"
        median = alternate(
            {
                "plain": lambda: decode(model, texts, None),
                "lookup": lambda guesses=guesses: decode(model, texts, guesses),  # type: ignore[misc]
            },
            given.rounds,
        )
        emit(
            "lookup",
            f"{guesses} guesses",
            documents=len(texts),
            training_steps=steps,
            copied_share=sum(copied) / len(copied),
            tokens=sum(len(out.sequences[0]) for out in plain),
            steps=plain_steps,
            steps_with_lookup=quick_steps,
            time_over_lookup=median["plain"] / median["lookup"],
        )


if __name__ == "__main__":
    main()
