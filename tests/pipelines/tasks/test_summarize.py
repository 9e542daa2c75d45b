"""Documents to summaries, in one window or several; what a fingerprint covers."""

import ctypes
import dataclasses
import json
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from longformer_core.errors import OutOfMemoryError
from longformer_core.scheduling import memory
from longformer_core.tokenization.tokenizer import LEDTokenizerFast
from pipelines.batch.worker import Worker
from pipelines.errors import Refused
from pipelines.run_directory.directory import differences
from pipelines.tasks.base import Document
from pipelines.tasks.preparation import Window
from pipelines.tasks.summarize import Summarize, SummarizeOptions, row_seed
from tests.helpers import corpus_texts
from tests.pipelines.asking import documents, outputs


def task_of(directory: Path, **options: Any) -> Summarize:
    given = {"model": str(directory), "max_new_tokens": 8, "max_source_tokens": 64} | options
    return Summarize.from_options(SummarizeOptions(**given), device="cpu")


def summaries(task: Summarize, texts: dict[str, str]) -> dict[str, str]:
    answers = outputs(Worker(task, "cpu", 2, 0.5), documents(task, texts))
    assert all(output.error is None for output in answers.values())
    return {name: answers[name].columns["summary"] for name in texts}


def document(name: str, ids: list[int]) -> Document:
    window = Window(np.array(ids, np.int32), (0,), 0, 1, len(ids) - 2)
    return Document(name, [window])


# --- options ---


def test_everything_that_is_wrong_is_said_at_once(led_directory: Path) -> None:
    with pytest.raises(Refused) as refused:
        task_of(
            led_directory,
            max_source_tokens=5000,
            window_tokens=4097,
            stride_tokens=4095,
            max_new_tokens=129,
        )
    problems = refused.value.problems
    assert len(problems) == 5
    for said in (
        "--max-source-tokens 5000: the model has 4096 positions",
        "--window-tokens 4097: the model has 4096 positions",
        "--stride-tokens 4095: a window of 4097 tokens must share less than that",
        "--window-tokens and --stride-tokens need --on-long windows",
        "129 new tokens, but the decoder has 128 positions",
    ):
        assert any(said in problem for problem in problems), said


def test_what_is_not_asked_for_is_the_models(led_directory: Path) -> None:
    task = Summarize.from_options(SummarizeOptions(model=str(led_directory)), device="cpu")
    assert (task.max_source_tokens, task.window_tokens, task.stride_tokens) == (4096, 4096, 0)
    assert (task.dtype, task.generation.num_beams, task.generation.max_length) == ("float32", 2, 24)
    on_gpu = Summarize.from_options(SummarizeOptions(model=str(led_directory)), device="cuda")
    assert on_gpu.dtype == "bfloat16"


# --- generating ---


def test_a_worker_answers_every_document_with_its_own_summary(led_directory: Path) -> None:
    task = task_of(led_directory)
    asked = documents(task, {f"row {i}": text[:200] for i, text in enumerate(corpus_texts(6))})
    worker = Worker(pickle.loads(pickle.dumps(task)), "cpu", 2, 0.5)
    calls = []
    together = {asked[i].id: o for i, o in worker(asked, lambda: calls.append(1))}
    assert sorted(together) == [one.id for one in asked]
    assert len({output.columns["summary"] for output in together.values()}) == 6
    assert calls
    for one in asked:
        assert outputs(worker, [one]) == {one.id: together[one.id]}
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    for output in together.values():
        assert output.error is None
        assert output.num_tokens_out is not None
        assert 0 < output.num_tokens_out <= 8
        assert "</s>" not in output.columns["summary"]
        assert len(tokenizer.encode(output.columns["summary"])) > 2


def test_a_worker_computes_with_the_threads_it_was_given(led_directory: Path) -> None:
    """Also where it decodes, which is neither the thread that loads it nor one that calls it.

    A new thread takes over torch's number with its first operation of the right kind only.
    """
    found: dict[str, int] = {}

    def run() -> None:
        worker = Worker(task_of(led_directory), "cpu", 3, 0.5)
        model = worker.engine._model
        encode = model.encode

        def counting(input_ids: Any, layout: Any) -> Any:
            states = encode(input_ids, layout)
            found[threading.current_thread().name] = _openmp_threads()
            return states

        model.encode = counting
        assert len(outputs(worker, [document("row", [0, *range(100, 130), 2])])) == 1

    before = torch.get_num_threads()
    loader = threading.Thread(target=run, name="loader")
    loader.start()
    loader.join()
    torch.set_num_threads(before)
    assert list(found.values()) == [3]
    assert "loader" not in found


def _openmp_threads() -> int:
    """What this thread's products of matrices use; to ask torch would be to set it."""
    library = next(
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libgomp" in line and "torch" in line  # scikit-learn brings one of its own
    )
    return int(ctypes.CDLL(library).omp_get_max_threads())


def test_the_memory_is_shared(led_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document beyond a worker's share fails alone, and what fits in it is decoded."""
    monkeypatch.setattr(memory, "available_bytes", lambda _: 2**30)
    row = document("row", [0, *range(100, 130), 2])
    assert outputs(Worker(task_of(led_directory), "cpu", 2, 0.5), [row])["row"].error is None
    starved = Worker(task_of(led_directory), "cpu", 2, 1e-5)
    assert isinstance(outputs(starved, [row])["row"].error, OutOfMemoryError)


def test_several_blocks_at_once_give_the_same_rows(led_directory: Path) -> None:
    task = task_of(led_directory)
    texts = {f"row {i}": text[: 100 + 20 * i] for i, text in enumerate(corpus_texts(24))}
    rows = documents(task, texts)
    worker = Worker(task, "cpu", 2, 0.5)
    one_by_one = {row.id: outputs(worker, [row])[row.id] for row in rows}
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda i: outputs(worker, rows[i : i + 6]), range(0, 24, 6))
        together = {name: output for block in found for name, output in block.items()}
    assert together == one_by_one


def test_an_end_at_once_is_an_empty_summary(led_directory: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(led_directory, tmp_path / "model"))
    defaults = json.loads((model / "generation_config.json").read_text())
    defaults |= {"forced_bos_token_id": 0, "forced_eos_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(defaults))
    worker = Worker(task_of(model, max_new_tokens=2, num_beams=1), "cpu", 2, 0.5)
    output = outputs(worker, [document("x", [0, 100, 2])])["x"]
    assert output.columns == {"summary": ""}
    assert output.num_tokens_out == 0


def test_sampling_depends_on_the_row_and_the_seed_alone(led_directory: Path) -> None:
    sampling = {"do_sample": True, "num_beams": 1}
    task = task_of(led_directory, **sampling)
    rows = documents(task, dict.fromkeys("abcd", corpus_texts(1)[0][:300]))
    first = outputs(Worker(task, "cpu", 2, 0.5), rows)
    assert len({output.columns["summary"] for output in first.values()}) == 4
    assert outputs(Worker(task, "cpu", 2, 0.5), rows[::-1]) == first
    other = task_of(led_directory, **sampling, seed=1)
    assert outputs(Worker(other, "cpu", 2, 0.5), rows) != first


def test_a_row_seed_never_changes() -> None:
    assert row_seed(0, "a.parquet#0") == 3004585536999514966
    names = [f"row {i}" for i in range(1000)]
    seeds = {row_seed(seed, name) for seed in (0, 1, -1) for name in names}
    assert len(seeds) == 3000
    assert all(0 <= s < 2**63 for s in seeds)
    # The seed and the name do not run together.
    assert row_seed(1, "1x") != row_seed(11, "x")


# --- windows ---


WINDOWS = {"on_long": "windows", "window_tokens": 40, "stride_tokens": 6}


@pytest.fixture(scope="module")
def long_texts() -> dict[str, str]:
    """Documents of some 3 to 15 windows."""
    return {f"row {i}": text[: 500 + 300 * i] for i, text in enumerate(corpus_texts(6, 500))}


def test_windows_are_summarized_and_their_summaries_again(
    led_directory: Path, long_texts: dict[str, str]
) -> None:
    """Every level is what the windows of the level before give one by one, as truncation does."""
    task = task_of(led_directory, **WINDOWS, keep_levels=True)
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    answers = outputs(Worker(task, "cpu", 2, 0.5), documents(task, long_texts))
    single = Worker(task_of(led_directory, max_source_tokens=40), "cpu", 2, 0.5)
    for name, text in long_texts.items():
        levels = answers[name].columns["levels"]
        assert len(levels) >= 2, "nothing was summarized again"
        assert len(levels[0]) > 2
        ids = tokenizer.encode(text)[1:-1]
        for level in levels:
            starts = [0]
            while starts[-1] + 38 < len(ids):
                starts.append(starts[-1] + 38 - 6)
            pieces = [[0, *ids[s : s + 38], 2] for s in starts]
            alone = outputs(single, [document(str(i), p) for i, p in enumerate(pieces)])
            assert level == [alone[str(i)].columns["summary"] for i in range(len(pieces))]
            ids = tokenizer.encode("\n".join(level))[1:-1]
        assert answers[name].columns["summary"] == "\n".join(levels[-1])
    assert any(len(answers[name].columns["levels"][-1]) == 1 for name in long_texts)


def test_rounds_end(led_directory: Path, long_texts: dict[str, str]) -> None:
    for rounds in (1, 2):
        task = task_of(led_directory, **WINDOWS, keep_levels=True, max_rounds=rounds)
        answers = outputs(Worker(task, "cpu", 2, 0.5), documents(task, long_texts))
        longest = max(len(output.columns["levels"]) for output in answers.values())
        assert longest == rounds + 1


def test_summaries_as_long_as_their_sources_end_the_rounds(
    led_directory: Path, long_texts: dict[str, str]
) -> None:
    """Else a document would be read `max_rounds` times and grow."""
    task = task_of(
        led_directory,
        on_long="windows",
        window_tokens=12,
        max_new_tokens=30,
        max_rounds=50,
        keep_levels=True,
    )
    texts = {name: text[:300] for name, text in long_texts.items()}
    answers = outputs(Worker(task, "cpu", 2, 0.5), documents(task, texts))
    assert all(1 <= len(o.columns["levels"]) < 10 for o in answers.values())
    assert any(len(o.columns["levels"][-1]) > 1 for o in answers.values())
    for output in answers.values():
        assert output.columns["summary"] == "\n".join(output.columns["levels"][-1])


def test_a_document_of_one_window_is_as_if_cut(led_directory: Path) -> None:
    texts = {f"row {i}": text[:60] for i, text in enumerate(corpus_texts(8))}
    for sampling in ({}, {"do_sample": True, "num_beams": 1}):
        in_windows = task_of(led_directory, **WINDOWS, **sampling)
        assert max(len(one.windows) for one in documents(in_windows, texts)) == 1
        plain = task_of(led_directory, **sampling)
        assert summaries(in_windows, texts) == summaries(plain, texts)


def test_windows_are_drawn_each_from_its_own_seed(led_directory: Path) -> None:
    task = task_of(
        led_directory,
        on_long="windows",
        window_tokens=12,
        do_sample=True,
        num_beams=1,
        max_rounds=1,
        keep_levels=True,
    )
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    text = "a" + " a" * 59
    assert len(tokenizer.encode(text)) == 62
    drawn = outputs(Worker(task, "cpu", 2, 0.5), documents(task, {"row": text}))
    first = drawn["row"].columns["levels"][0]
    assert len(set(first)) > 3, "windows of one text draw alike"
    assert outputs(Worker(task, "cpu", 2, 0.5), documents(task, {"row": text})) == drawn


def test_a_window_that_fails_fails_its_document_alone(
    led_directory: Path, long_texts: dict[str, str]
) -> None:
    task = task_of(led_directory, **WINDOWS)
    asked = documents(task, long_texts)
    expected = outputs(Worker(task, "cpu", 2, 0.5), asked)
    middle = asked[1].windows[1]
    outside = Window(middle.input_ids + 10**6, (0,), middle.start, 1, middle.size)
    bad = Document("bad", [asked[1].windows[0], outside, *asked[1].windows[2:]])
    found = outputs(Worker(task, "cpu", 2, 0.5), [*asked[:2], bad, *asked[2:]])
    assert "1000" in str(found.pop("bad").error)
    assert found == expected


# --- fingerprint ---


@pytest.fixture
def own_model(led_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(led_directory, tmp_path / "model"))


def test_a_fingerprint_comes_back_from_a_file_as_it_was(led_directory: Path) -> None:
    task = task_of(led_directory)
    generation = task.generation.replace(
        early_stopping="never", bad_words_ids=[[5, 6]], length_penalty=1e-5, eos_token_id=[2, 7]
    )
    fingerprint = dataclasses.replace(task, generation=generation).fingerprint()
    assert differences(yaml.safe_load(yaml.safe_dump(fingerprint)), fingerprint) == []
    assert json.loads(json.dumps(fingerprint)) == fingerprint


def test_what_a_fingerprint_tells_apart(led_directory: Path) -> None:
    sampling = {"do_sample": True, "num_beams": 1}
    windows = {"on_long": "windows"}
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "options.num_beams was 2, is 3": ({}, {"num_beams": 3}),
        "options.length_penalty was 1.0, is 1.1": ({}, {"length_penalty": 1.1}),
        "options.max_source_tokens was 64, is 65": ({}, {"max_source_tokens": 65}),
        "options.on_long was 'truncate', is 'error'": ({}, {"on_long": "error"}),
        "dtype was 'float32', is 'bfloat16'": ({}, {"dtype": "bfloat16"}),
        "options.do_sample was False, is True": ({"num_beams": 1}, sampling),
        "options.seed was 0, is 5": (sampling, sampling | {"seed": 5}),
        "options.window_tokens was 64, is 40": (windows, windows | {"window_tokens": 40}),
        "options.stride_tokens was 0, is 4": (windows, windows | {"stride_tokens": 4}),
        "options.max_rounds was 4, is 2": (windows, windows | {"max_rounds": 2}),
    }
    for told, (old, new) in changes.items():
        before = task_of(led_directory, **old).fingerprint()
        assert told in differences(before, task_of(led_directory, **new).fingerprint())
    before = task_of(led_directory).fingerprint()
    for same in ({"batch_tokens": 5}, {"seed": 5}, {"max_rounds": 2}, {"dtype": "float32"}):
        assert task_of(led_directory, **same).fingerprint() == before
    kept = task_of(led_directory, keep_levels=True).fingerprint()
    assert differences(before, kept), "it is a column more"


def test_a_fingerprint_changes_with_the_model_files_in_use(own_model: Path) -> None:
    task = task_of(own_model)
    before = task.fingerprint()
    (own_model / "README.md").write_text("not part of the model")
    (own_model / "pytorch_model.bin").write_bytes(b"not read beside safetensors")
    assert task.fingerprint() == before
    weights = own_model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert [d.split(" was ")[0] for d in differences(before, task.fingerprint())] == [
        "model.model.safetensors"
    ]
    now = task.fingerprint()
    (own_model / "merges.txt").write_text((own_model / "merges.txt").read_text() + "\n")
    assert [d.split(" was ")[0] for d in differences(now, task.fingerprint())] == [
        "model.merges.txt"
    ]


def test_the_same_model_elsewhere_is_the_same(led_directory: Path, own_model: Path) -> None:
    assert task_of(own_model).fingerprint() == task_of(led_directory).fingerprint()
    assert [loc.path for loc in task_of(own_model).locations()] == [str(own_model)]
