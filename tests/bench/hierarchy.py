"""A whole book summarized window by window, in the memory that one batch of its windows takes.

`python -m tests.bench.hierarchy [--tokens 200000]` prints a JSON line for each of two fresh
processes, one that reads as many windows as are encoded at once and one that reads the book, and a
line that compares them. Needs LONGHAUL_TEST_DATA with `books`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from pipelines.batch.worker import Worker
from pipelines.tasks.preparation import tokenizer_of
from pipelines.tasks.summarize import Summarize, SummarizeOptions
from tests.helpers import data_folder, make_led_directory
from tests.pipelines.asking import documents, prepare

WINDOW, BATCH = 1024, 16_384
SIZES: dict[str, Any] = {
    "d_model": 128,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "attention_window": [256, 256],
    "max_encoder_position_embeddings": 1024,
}


def book(num_tokens: int, model: str) -> str:
    """The first tokens of a real book that has as many."""
    folder = data_folder()
    assert folder is not None, "LONGHAUL_TEST_DATA is not set"
    tokenizer = tokenizer_of(model)
    (file,) = (folder / "books").glob("validation-*.parquet")
    for text in pq.read_table(file, columns=["text"])["text"].to_pylist():
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= num_tokens:
            return str(tokenizer.decode(ids[:num_tokens], skip_special_tokens=False))
    raise ValueError(f"no book has {num_tokens} tokens")


def summarize(model: str, text: str) -> dict[str, Any]:
    """Summarize a text in this process; say what it came to and the memory it took."""
    options = SummarizeOptions(
        model=model, on_long="windows", window_tokens=WINDOW, batch_tokens=BATCH,
        num_beams=2, max_new_tokens=48, keep_levels=True,
    )  # fmt: skip
    torch.set_num_threads(2)
    task = Summarize.from_options(options, device="cpu")
    (prepared,) = prepare(task, [text]).to_pylist()
    worker = Worker(task, "cpu", 2, 0.5)
    loaded = _peak_bytes()
    started = time.perf_counter()
    ((_, output),) = worker(documents(task, {"book": text}), lambda: None)
    assert output.error is None, output.error
    return {
        "tokens": prepared["num_tokens_in"],
        "windows": prepared["num_windows"],
        "coverage": prepared["coverage"],
        "windows_by_round": [len(level) for level in output.columns["levels"]],
        "summary_characters": len(output.columns["summary"]),
        "seconds": round(time.perf_counter() - started, 2),
        "loaded_bytes": loaded,
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kibibytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--model", help="Of a process that is measured; the text is on stdin.")
    given = parser.parse_args()
    if given.model:
        print(json.dumps(summarize(given.model, sys.stdin.read())))
        return
    with tempfile.TemporaryDirectory() as place:
        model = str(make_led_directory(Path(place), **SIZES))
        found = []
        for num_tokens in (BATCH // WINDOW * (WINDOW - 2), given.tokens):
            words = [sys.executable, "-m", "tests.bench.hierarchy", "--model", model]
            text = book(num_tokens, model)
            done = subprocess.run(
                words, input=text, check=True, stdout=subprocess.PIPE, encoding="utf-8"
            )
            found.append(json.loads(done.stdout))
            print(json.dumps(found[-1]))
    batch, whole = found
    ratio = whole["peak_bytes"] / batch["peak_bytes"]
    print(json.dumps({"peak_of_the_book_by_peak_of_a_batch": round(ratio, 3)}))


if __name__ == "__main__":
    main()
