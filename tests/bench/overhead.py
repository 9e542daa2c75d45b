"""What the batch job costs beside the model: wall time over a plain loop, memory over row counts.

    python -m tests.bench.overhead time [--rows 20000] [--rounds 3] [--workers 2]
    python -m tests.bench.overhead memory [--rows 5000 20000] [--workers 2]

`time` runs the job and a plain loop of the same model calls in turn, in one process tree, compares
their rows and prints the ratio of the medians. The job counts from its first token to its last row
written; the loop has the token ids in memory and writes nothing. Both compute with two torch
threads: the loop's work together, the job's are divided over `--workers` (2, with one each).
`memory` samples the summed PSS of the job's processes plus the used object store, one fresh process
for each row count.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray
import torch

from pipelines.batch.driver import versions
from pipelines.batch.worker import Worker
from pipelines.cluster import connect
from pipelines.tasks.base import Document
from pipelines.tasks.summarize import Summarize, SummarizeOptions
from tests.bench.timed_job import Timed, job_rows, job_seconds, run_job
from tests.helpers import make_led_directory, trained_tokenizer_directory
from tests.pipelines.asking import documents, outputs

NUM_TOKENS, NEW_TOKENS, VOCABULARY, THREADS = 200, 16, 5000, 2


def make_model(folder: Path) -> Path:
    return make_led_directory(
        folder / "model",
        tokenizer=trained_tokenizer_directory(),
        vocab_size=VOCABULARY,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        attention_window=[64, 64],
        max_encoder_position_embeddings=1024,
    )


def make_corpus(folder: Path, task: Summarize, num_rows: int) -> Path:
    """Rows of exactly `NUM_TOKENS` tokens, drawn from the vocabulary's whole words."""
    vocabulary = json.loads((Path(task.model) / "vocab.json").read_text(encoding="utf-8"))
    single = [f" {w[1:]}" for w in sorted(vocabulary) if w[0] == "Ġ" and w[1:].isalpha()][:500]
    draw = random.Random(0)
    folder.mkdir(parents=True)
    per_file = 2500
    for start in range(0, num_rows, per_file):
        ids = [f"{i:06d}" for i in range(start, min(num_rows, start + per_file))]
        texts = ["".join(draw.choices(single, k=NUM_TOKENS - 2)) for _ in ids]
        pq.write_table(pa.table({"id": ids, "text": texts}), folder / f"{start:06d}.parquet")
    return folder


def make_task(model: Path, note: Path) -> Timed:
    options = SummarizeOptions(
        model=str(model), num_beams=1, max_new_tokens=NEW_TOKENS, max_source_tokens=1024
    )
    task = Timed.from_options(options, device="cpu")
    generation = task.generation.replace(min_new_tokens=NEW_TOKENS)
    return dataclasses.replace(task, generation=generation, note=str(note))


def loop_blocks(task: Timed, corpus: Path, block_rows: int) -> list[list[Document]]:
    """The documents of the corpus in blocks as large as the job's."""
    table = pads.dataset(str(corpus)).to_table().sort_by("id")
    texts = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    found = documents(task, texts)
    return [found[i : i + block_rows] for i in range(0, len(found), block_rows)]


def run_loop(worker: Worker, blocks: list[list[Document]]) -> dict[str, str]:
    rows = {}
    for block in blocks:
        for name, output in outputs(worker, block).items():
            rows[name] = output.columns["summary"]
    return rows


def bench_time(num_rows: int, rounds: int, num_workers: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="longhaul-bench-"))
    model = make_model(folder)
    corpus = make_corpus(folder / "corpus", make_task(model, folder / "unused"), num_rows)
    plain = make_task(model, folder / "loop")
    blocks = loop_blocks(plain, corpus, 128)
    worker = Worker(plain, "cpu", THREADS, 0.5)
    job_s, loop_s = [], []
    for number in range(rounds):
        started = time.monotonic()
        expected = run_loop(worker, blocks)
        loop_s.append(time.monotonic() - started)
        task = make_task(model, folder / f"first-{number}")
        output = folder / f"run-{number}"
        run_job(task, corpus, output, num_workers)
        assert job_rows(output) == expected, "the job and the loop disagree: no speed is printed"
        job_s.append(job_seconds(task, output))
        emit("round", rows=num_rows, workers=num_workers, loop_s=loop_s[-1], job_s=job_s[-1])
    ratio = statistics.median(job_s) / statistics.median(loop_s)
    values = {"workers": num_workers, "job_over_loop": round(ratio, 3), "goal": 1.25}
    emit("time", rows=num_rows, rounds=rounds, **values)


def bench_memory(row_counts: list[int], num_workers: int) -> None:
    peaks = {}
    for num_rows in row_counts:
        options = ["--rows", str(num_rows), "--workers", str(num_workers)]
        command = [sys.executable, "-m", "tests.bench.overhead", "peak", *options]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[num_rows] = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
        emit("peak", rows=num_rows, peak_bytes=peaks[num_rows])
    few, many = peaks[min(row_counts)], peaks[max(row_counts)]
    emit("memory", many_over_few=round(many / few, 3), limit_bytes=int(1.1 * few + 100 * 2**20))


def measure_peak(num_rows: int, num_workers: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="longhaul-bench-"))
    model = make_model(folder)
    task = make_task(model, folder / "first")
    corpus = make_corpus(folder / "corpus", task, num_rows)
    peak, finished = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not finished.wait(0.5):
            peak = max(peak, summed_pss() + object_store_bytes())

    with connect(None):
        sampler = threading.Thread(target=sample)
        sampler.start()
        run_job(task, corpus, folder / "run", num_workers)
        finished.set()
        sampler.join()
    emit("peak", rows=num_rows, peak_bytes=peak)


def summed_pss() -> int:
    """Of this process and everything below it."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def object_store_bytes() -> int:
    name = "object_store_memory"
    return int(ray.cluster_resources()[name] - ray.available_resources().get(name, 0))


def emit(kind: str, **values: Any) -> None:
    line = {"bench": "overhead", "kind": kind} | values
    line |= {"torch_threads": THREADS, "cores": os.cpu_count(), "versions": versions()}
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["time", "memory", "peak"])
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=THREADS)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    if given.what == "time":
        bench_time(*(given.rows or [20000]), given.rounds, given.workers)
    elif given.what == "memory":
        bench_memory(given.rows or [5000, 20000], given.workers)
    else:
        measure_peak(*given.rows, given.workers)


if __name__ == "__main__":
    main()
