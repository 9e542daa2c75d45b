"""What a server costs beside its engine, and what it gains over a plain deployment.

    python -m tests.bench.serve overhead idle plain encoder [--documents 64] [--clients 32]

overhead: an LED (d 256, 4+4 layers, 4 beams, 32 tokens), documents of 500 to 4,000 tokens: the bare
    engine, fed at once, against `longhaul serve` under many clients, one torch thread each;
    documents a second, and documents a CPU-second of the process that holds the model.
idle: one document at a time, what the server adds to the engine's own time.
plain: the same documents to transformers in a Serve deployment that batches and pads.
encoder: a Longformer (d 256, 4 layers), documents of 33 to 8,000 tokens: against one by one in the
    same engine, and against a padded deployment.
Answers are compared before a speed is printed.
"""

import argparse
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from pipelines.batch.worker import Worker
from pipelines.serve.options import ServeOptions, make_task
from tests.bench.measure import emit
from tests.bench.plain_serve import GENERATE
from tests.helpers import MEDIUM, all_texts, make_led_directory
from tests.pipelines.asking import documents
from tests.pipelines.serve.cluster import Command
from tests.pipelines.tasks.heads import make_head

GOALS = {
    "overhead": "at least 0.9 of the bare engine per model CPU-second",
    "idle": "at most 15 ms at the median",
    "plain": "at least 4 times, and a lower p95",
    "encoder": "at least 3 times one by one, 5 times padded",
}
THREADS = 1


def make_texts(count: int, least: int, most: int) -> list[str]:
    """Texts of about so many tokens, evenly spread."""
    words = " ".join(text[:50_000] for text in all_texts()[:200]).split()
    draw = random.Random(0)
    texts = []
    for number in range(count):
        # A word of these is about 1.33 tokens.
        size = int((least + (most - least) * number / max(1, count - 1)) / 1.33)
        start = draw.randrange(max(1, len(words) - size))
        texts.append(" ".join(words[start : start + size]))
    draw.shuffle(texts)
    return texts


def ask(url: str, texts: Sequence[str], num_clients: int) -> tuple[list[Any], list[float], float]:
    """Return all answers, the seconds of each, and the seconds of all."""
    answers: list[Any] = [None] * len(texts)
    seconds = [0.0] * len(texts)
    todo = iter(range(len(texts)))
    lock = threading.Lock()

    def client() -> None:
        with httpx.Client(timeout=3600) as http:
            while True:
                with lock:
                    number = next(todo, None)
                if number is None:
                    return
                began = time.perf_counter()
                response = http.post(url, json={"inputs": texts[number]})
                seconds[number] = time.perf_counter() - began
                assert response.status_code == 200, response.text
                answers[number] = response.json()[0]

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, seconds, time.perf_counter() - began


def cpu_seconds(command: Command, kind: str) -> float:
    return sum(sum(part.cpu_times()[:2]) for part in command.parts(kind))


def own_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def p95(seconds: Sequence[float]) -> float:
    return sorted(seconds)[int(0.95 * (len(seconds) - 1))]


def serve_options(model: Path, **options: Any) -> ServeOptions:
    pairs = tuple(f"{name}={value}" for name, value in options.items())
    return ServeOptions(model=str(model), device="cpu", task_option=pairs, threads=THREADS)


def start(folder: Path, model: Path, *words: str) -> Command:
    command = Command(
        folder / "serve.txt", "--model", str(model), "--device", "cpu", f"--threads={THREADS}",
        "--timeout-s=3600", "--max-queued-tokens=10000000", *words,
    )  # fmt: skip
    command.wait_until_ready()
    return command


class PlainServer:
    """`tests.bench.plain_serve` for a block."""

    def __init__(self, model: Path, kind: str, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.bench.plain_serve", str(model), str(port),
             kind, str(THREADS)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        while "curl" not in self._process.stdout.readline():
            assert self._process.poll() is None

    def __enter__(self) -> "PlainServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def make_led(folder: Path) -> Path:
    return make_led_directory(
        folder / "led",
        attention_window=[256] * 4,
        max_encoder_position_embeddings=16384,
        **MEDIUM,
        generation={"no_repeat_ngram_size": 0, "early_stopping": False},
    )


def bench_writing(cases: Sequence[str], given: argparse.Namespace, folder: Path) -> None:
    model = make_led(folder)
    texts = make_texts(given.documents, 500, 4000)
    options = {"num_beams": 4, "max_new_tokens": 32, "min_length": 32}
    task = make_task(serve_options(model, **options))
    worker = Worker(task, "cpu", THREADS, 0.5)
    list(worker(documents(task, {"warm": texts[0]}), lambda: None))
    began, cpu = time.perf_counter(), own_cpu_seconds()
    asked = documents(task, {str(number): text for number, text in enumerate(texts)})
    bare = dict(worker(asked, lambda: None))
    bare_s, bare_cpu = time.perf_counter() - began, own_cpu_seconds() - cpu
    expected = [bare[number].columns["summary"] for number in range(len(texts))]
    assert len(set(expected)) > len(texts) // 2
    words = [f"--task-option={name}={value}" for name, value in options.items()]
    command = start(folder, model, *words)
    try:
        ask(command.url, texts[:4], 4)
        parts = ("Model", "Gateway", "ProxyActor")
        before = {kind: cpu_seconds(command, kind) for kind in parts}
        answers, seconds, served_s = ask(command.url, texts, given.clients)
        used = {kind: cpu_seconds(command, kind) - before[kind] for kind in parts}
        same = sum(a["summary_text"] == e for a, e in zip(answers, expected, strict=True))
        assert same >= 0.95 * len(texts), f"{same} of {len(texts)} summaries are the engine's"
        tokens = sum(answer["usage"]["tokens_in"] for answer in answers)
        common = {"documents": len(texts), "mean_tokens": tokens / len(texts), "same": same}
        if "overhead" in cases:
            emit(
                "serve", "overhead", **common, clients=given.clients,
                bare_documents_per_s=len(texts) / bare_s,
                served_documents_per_s=len(texts) / served_s,
                served_over_bare_per_model_cpu_s=bare_cpu / used["Model"],
                cpu_ms_a_document={
                    "bare": 1000 * bare_cpu / len(texts),
                    **{kind: 1000 * value / len(texts) for kind, value in used.items()},
                },
                median_s=statistics.median(seconds), p95_s=p95(seconds), goal=GOALS["overhead"],
            )  # fmt: skip
        if "idle" in cases:
            bench_idle(command, worker, texts, folder)
    finally:
        command.end()
    if "plain" in cases:
        with PlainServer(model, "summarize", given.port) as plain:
            ask(plain.url, texts[:2], 2)
            _, plain_seconds, plain_s = ask(plain.url, texts, given.clients)
        emit(
            "serve", "plain", **common, clients=given.clients, options=GENERATE,
            plain_over_ours=plain_s / served_s, plain_p95_s=p95(plain_seconds),
            p95_s=p95(seconds), goal=GOALS["plain"],
        )  # fmt: skip


def bench_idle(command: Command, worker: Worker, texts: Sequence[str], folder: Path) -> None:
    text = min(texts, key=len)
    served, bare = [], []
    with httpx.Client(timeout=60) as http:
        for _ in range(30):
            began = time.perf_counter()
            assert http.post(command.url, json={"inputs": text}).status_code == 200
            served.append(time.perf_counter() - began)
            began = time.perf_counter()
            list(worker(documents(worker.task, {"a": text}), lambda: None))
            bare.append(time.perf_counter() - began)
    emit(
        "serve", "idle", rounds=30,
        served_ms=1000 * statistics.median(served), bare_ms=1000 * statistics.median(bare),
        added_ms=1000 * (statistics.median(served) - statistics.median(bare)), goal=GOALS["idle"],
    )  # fmt: skip


def bench_encoder(given: argparse.Namespace, folder: Path) -> None:
    model = folder / "encoder"
    make_head(
        model, "LongformerModel", hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=1024, attention_window=[256] * 4, max_position_embeddings=8194,
    )  # fmt: skip
    texts = make_texts(2 * given.documents, 33, 7000)
    task = make_task(serve_options(model))
    worker = Worker(task, "cpu", THREADS, 0.5)
    asked = documents(task, {str(number): text for number, text in enumerate(texts)})
    list(worker(asked[:1], lambda: None))
    began = time.perf_counter()
    alone = [next(iter(worker([each], lambda: None)))[1].columns["embedding"] for each in asked]
    alone_s = time.perf_counter() - began
    command = start(folder, model)
    try:
        ask(command.url, texts[:4], 4)
        answers, seconds, served_s = ask(command.url, texts, 2 * given.clients)
        np.testing.assert_allclose(np.array(answers), np.stack(alone), rtol=1e-3, atol=1e-4)
    finally:
        command.end()
    with PlainServer(model, "embed", given.port) as plain:
        ask(plain.url, texts[:2], 2)
        _, plain_seconds, plain_s = ask(plain.url, texts, 2 * given.clients)
    emit(
        "serve", "encoder", documents=len(texts), clients=2 * given.clients,
        documents_per_s=len(texts) / served_s, one_by_one_over_ours=alone_s / served_s,
        plain_over_ours=plain_s / served_s, p95_s=p95(seconds), plain_p95_s=p95(plain_seconds),
        goal=GOALS["encoder"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--port", type=int, default=8391)
    given = parser.parse_args()
    cases = given.cases or list(GOALS)
    if set(cases) - set(GOALS):
        parser.error(f"choose from {', '.join(GOALS)}")
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name:
        if set(cases) - {"encoder"}:
            bench_writing(cases, given, Path(name))
        if "encoder" in cases:
            bench_encoder(given, Path(name))


if __name__ == "__main__":
    main()
