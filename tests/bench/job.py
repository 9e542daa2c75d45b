"""What the summarization job makes of the engine, and what a plain transformers script would take.

    LONGHAUL_TEST_DATA=<folder> python -m tests.bench.job [--documents 24] [--new-tokens 32]
        [--rounds 3] [--workers 1] [--dtype float32 bfloat16] [--model base|large|tiny]

Transcripts of `qmsum`, cut to 2,000 tokens of the published vocabulary, through a directory of an
untrained LED-base, 4 beams, exactly as many new tokens as asked for. In turn: the job, from its
first token to its last row written; the engine alone, with the token ids in memory, in this
process, which has decoded before; the same in a process of its own that has just loaded the model,
as a job's worker has, and must ask the system for its memory; the same in this one beside an idle
cluster, whose processes take their time of the cores too; and a loop of transformers' `generate`
over padded batches of four. All compute with one thread for each core, as the job does: it divides
them among its workers.
Before the job and before the process of its own, as much memory as either needs is touched once, so
that a virtual machine which gave it back to its host has it again; `page_us_...` says what a page
of it took.
Outputs are compared first: in float32 the loop's tokens are the engine's (`contestants.compare`)
and so are the job's rows, both but for a twentieth; in bfloat16 the agreement is printed instead.
Then the ratios of medians: job over engine, each of the three, and loop over job. What Ray and the
pipeline cost is the job over the engine in a process of its own. The job over the engine that has
its memory contains what a new process pays for memory, too: in float32 half a million pages. Where
they are dear (above some 8 us) that alone can be more than the goal allows.
"""

import argparse
import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import torch
import transformers

from longformer_core import LEDForConditionalGeneration
from longformer_core.tokenization.tokenizer import LEDTokenizerFast
from pipelines.cluster import connect, num_cores
from pipelines.tasks.summarize import SummarizeOptions
from tests.bench.contestants import (
    GEOMETRIES,
    MUST_AGREE,
    Work,
    compare,
    engine_run,
    generate_run,
    generate_scored,
)
from tests.bench.measure import emit, new_page_us
from tests.bench.timed_job import Timed, job_rows, job_seconds, run_job
from tests.helpers import data_folder, make_led_directory
from tests.pipelines.asking import prepare

BEAMS, SOURCE_TOKENS, LOOP_BATCH = 4, 2000, 4
JOB_MEMORY = 3 * 2**30
JOB_OVER_ENGINE, LOOP_OVER_JOB = (
    "at most 1.15",
    {"float32": "at least 3.5", "bfloat16": "at least 5"},
)


def make_corpus(folder: Path, data: Path, num_documents: int) -> Path:
    """Write different transcripts from all over the split, in one file."""
    files = sorted((data / "qmsum").glob("validation-*.parquet"))
    texts = pads.dataset([str(file) for file in files]).to_table(columns=["text"])["text"]
    # Rows that follow one another ask about one transcript.
    different = list(dict.fromkeys(texts.to_pylist()))
    chosen = different[:: max(1, len(different) // num_documents)][:num_documents]
    assert len(chosen) == num_documents, f"the split has {len(chosen)} different documents"
    folder.mkdir()
    ids = [f"{row:04d}" for row in range(num_documents)]
    pq.write_table(pa.table({"id": ids, "text": chosen}), folder / "documents.parquet")
    return folder


def make_work(task: Timed, corpus: Path) -> Work:
    """Encode the corpus as the job does."""
    prepared = prepare(task, pq.read_table(corpus)["text"].cast(pa.large_string()))
    windows = prepared["__windows"].to_pylist()
    documents = [row[0]["input_ids"] for row in windows]
    return Work(documents, [task.generation.total_length - 1] * len(documents), task.generation)


def share_equal(got: list[str], expected: list[str]) -> float:
    return sum(a == b for a, b in zip(got, expected, strict=True)) / len(expected)


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def seconds_in_a_fresh_process(model: Path, dtype: str, work: Work) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_load_and_run, model, dtype, work).result()


def _load_and_run(model: Path, dtype: str, work: Work) -> float:
    torch.set_num_threads(num_cores())
    ours = LEDForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype))
    return seconds(lambda: engine_run(ours, work))


class Bench:
    """The contestants with one model in one dtype; their outputs are compared on the way."""

    def __init__(
        self, folder: Path, model: Path, corpus: Path, dtype: str, given: argparse.Namespace
    ) -> None:
        self.folder, self.model, self.corpus = folder, model, corpus
        self.dtype, self.given = dtype, given
        self.work = make_work(self.make_task("unused"), corpus)
        self.ours = LEDForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype))
        self.theirs = transformers.LEDForConditionalGeneration.from_pretrained(
            model, dtype=getattr(torch, dtype)
        ).eval()
        outputs = engine_run(self.ours, self.work)
        alone = generate_scored(self.theirs, self.work)
        self.is_exact = dtype == "float32"
        self.agreement = compare(
            self.ours, self.work, outputs, alone, "loop", must_agree=self.is_exact
        )
        decode = LEDTokenizerFast.from_pretrained(model).decode
        self.expected = [decode(o.sequences[0], skip_special_tokens=True) for o in outputs]

    def make_task(self, name: str) -> Timed:
        num_new = self.given.new_tokens
        options = SummarizeOptions(
            model=str(self.model),
            num_beams=BEAMS,
            max_new_tokens=num_new,
            max_source_tokens=SOURCE_TOKENS,
            dtype=self.dtype,
        )
        task = Timed.from_options(options, device="cpu")
        generation = task.generation.replace(min_new_tokens=num_new)
        note = str(self.folder / f"first-{name}")
        return dataclasses.replace(task, generation=generation, note=note)

    def round(self, number: int) -> dict[str, float]:
        """Run each contestant once, in turn; return their seconds and what else was measured."""
        found: dict[str, float] = {"page_us_before_job": new_page_us(JOB_MEMORY)}
        found |= self.job(f"{self.dtype}-{number}")
        found["engine_s"] = seconds(self.engine)
        found["page_us_before_fresh_process"] = new_page_us(JOB_MEMORY)
        found["engine_in_fresh_process_s"] = seconds_in_a_fresh_process(
            self.model, self.dtype, self.work
        )
        with connect(None):
            found["engine_beside_cluster_s"] = seconds(self.engine)
        found["loop_s"] = seconds(lambda: generate_run(self.theirs, self.work, LOOP_BATCH))
        return found

    def engine(self) -> None:
        engine_run(self.ours, self.work)

    def job(self, name: str) -> dict[str, float]:
        task, output = self.make_task(name), self.folder / name
        run_job(task, self.corpus, output, self.given.workers)
        rows = job_rows(output)
        equal = share_equal([rows[row] for row in sorted(rows)], self.expected)
        assert not self.is_exact or equal >= MUST_AGREE, (
            f"{equal:.0%} of the job's rows are the engine's: no speed is printed"
        )
        return {"equal_rows": equal, "job_s": job_seconds(task, output)}


def bench(folder: Path, model: Path, corpus: Path, dtype: str, given: argparse.Namespace) -> None:
    contestants = Bench(folder, model, corpus, dtype, given)
    each = [contestants.round(number) for number in range(given.rounds)]
    median = {name: statistics.median(found[name] for found in each) for name in each[0]}
    # Of equal rows the worst round counts.
    median["equal_rows"] = min(found["equal_rows"] for found in each)
    job = median["job_s"]
    emit(
        "job",
        dtype,
        model=given.model,
        documents=len(contestants.work.documents),
        source_tokens=sum(map(len, contestants.work.documents)),
        new_tokens=given.new_tokens,
        beams=BEAMS,
        workers=given.workers,
        rounds=given.rounds,
        **median,
        job_over_engine=job / median["engine_s"],
        job_over_engine_goal=JOB_OVER_ENGINE,
        job_over_engine_in_fresh_process=job / median["engine_in_fresh_process_s"],
        job_over_engine_in_fresh_process_goal=JOB_OVER_ENGINE,
        job_over_engine_beside_cluster=job / median["engine_beside_cluster_s"],
        loop_over_job=median["loop_s"] / job,
        loop_over_job_goal=LOOP_OVER_JOB[dtype],
        **contestants.agreement,
        each=each,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--dtype", nargs="+", choices=list(LOOP_OVER_JOB), default=["float32"])
    parser.add_argument("--model", choices=list(GEOMETRIES), default="base")
    given = parser.parse_args()
    data = data_folder()
    if data is None:
        parser.error("set LONGHAUL_TEST_DATA to the folder of the corpora and the vocabulary")
    torch.set_num_threads(num_cores())
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="longhaul-bench-") as name:
        folder = Path(name)
        geometry = GEOMETRIES[given.model]
        model = make_led_directory(folder / "model", tokenizer=data / "tokenizer", **geometry)
        corpus = make_corpus(folder / "corpus", data, given.documents)
        for dtype in given.dtype:
            bench(folder, model, corpus, dtype, given)


if __name__ == "__main__":
    main()
