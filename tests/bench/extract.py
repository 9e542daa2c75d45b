"""How good extractive summaries and document vectors of a published encoder are.

    LONGHAUL_TEST_DATA=data python -m tests.bench.extract --model minilm-longformer/ [--rows 99]

Prints one JSON line: ROUGE of the key sentences of `proposals` against their own abstracts, beside
the first sentences of the same number, and the share of abstracts whose nearest document, by the
mean states of windows, is their own.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from longformer_core.metrics import rank_documents, score_summaries
from pipelines.batch.worker import Worker
from pipelines.tasks.embed import Embed, EmbedOptions
from pipelines.tasks.sentences import is_prose, sentence_spans
from pipelines.tasks.summarize import Summarize, SummarizeOptions
from tests.pipelines.asking import documents, outputs


def rouge(texts: list[str], references: list[str]) -> dict[str, float]:
    scores = score_summaries(texts, references).summary
    return {name: round(100 * scores[name], 2) for name in ("rouge1", "rouge2", "rougeL")}


def lead(text: str, count: int) -> str:
    """Return the first sentences that are prose."""
    sentences = (text[a:b] for a, b in sentence_spans(text))
    return " ".join([each for each in sentences if is_prose(each)][:count])


def vectors(model: str, texts: list[str]) -> np.ndarray:
    """[texts, d] as `longhaul embed` writes them, by windows of 1,280 tokens."""
    options = EmbedOptions(model=model, on_long="windows", window_tokens=1280)
    task = Embed.from_options(options, device="cpu")
    worker = Worker(task, "cpu", torch.get_num_threads(), 0.3)
    found = outputs(worker, documents(task, {str(i): text for i, text in enumerate(texts)}))
    return np.stack([found[str(i)].columns["embedding"] for i in range(len(texts))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=99)
    parser.add_argument("--num-sentences", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    path = Path(os.environ["LONGHAUL_TEST_DATA"]) / "proposals/validation-00000-of-00001.parquet"
    rows = pq.read_table(path, columns=["text", "summary"]).to_pylist()[: given.rows]
    texts, references = [row["text"] for row in rows], [row["summary"] for row in rows]
    options = SummarizeOptions(model=given.model, num_sentences=given.num_sentences)
    task = Summarize.from_options(options, device="cpu")
    worker = Worker(task, "cpu", given.threads, 0.3)
    started = time.perf_counter()
    found = outputs(worker, documents(task, {str(i): text for i, text in enumerate(texts)}))
    seconds = time.perf_counter() - started
    summaries = [found[str(i)].columns["summary"] for i in range(len(rows))]
    ranked = rank_documents(vectors(given.model, references), vectors(given.model, texts), k=1)
    nearest = [bool(each) and each[0] == i for i, each in enumerate(ranked)]
    result = {
        "bench": "extract",
        "rows": len(rows),
        "num_sentences": given.num_sentences,
        "threads": given.threads,
        "seconds": round(seconds, 1),
        "extract": rouge(summaries, references),
        "lead": rouge([lead(text, given.num_sentences) for text in texts], references),
        "recall@1": round(float(np.mean(nearest)), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
