"""Text to token ids, with every row accounted for; ids to summaries; what a fingerprint covers."""

import ctypes
import dataclasses
import json
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from longformer_core.errors import OutOfMemoryError
from longformer_core.generation.config import GenerationConfig
from longformer_core.scheduling import memory
from longformer_core.tokenization.tokenizer import LEDTokenizerFast
from pipelines.run_directory.directory import differences
from pipelines.tasks.base import Encoded
from pipelines.tasks.summarize import Summarize, row_seed
from tests.helpers import corpus_texts
from tests.pipelines.parquet import invalid_utf8


def task_of(directory: Path, **options: Any) -> Summarize:
    generation = GenerationConfig.from_pretrained(directory).replace(max_new_tokens=8)
    values = {"model": str(directory), "generation": generation, "max_source_tokens": 64}
    return Summarize(**values | options)


def encode(task: Summarize, texts: Any) -> Encoded:
    array = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
    return task.load_encoder()(pa.chunked_array([array], pa.large_string()))


def kinds(encoded: Encoded) -> list[str | None]:
    return [e["type"] if e else None for e in encoded.errors]


# --- encoding ---


def test_whole_documents_are_encoded_as_the_tokenizer_does(led_directory: Path) -> None:
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    texts = [text[:150] for text in corpus_texts(5)]
    encoded = encode(task_of(led_directory, max_source_tokens=512), texts)
    assert encoded.input_ids.to_pylist() == [tokenizer.encode(t) for t in texts]
    assert encoded.input_ids.type == pa.large_list(pa.int32())
    assert encoded.num_tokens_in.to_pylist() == [len(tokenizer.encode(t)) for t in texts]
    assert encoded.num_windows.to_pylist() == [1] * 5
    assert encoded.truncated.to_pylist() == [False] * 5
    assert encoded.coverage.to_pylist() == [1.0] * 5
    assert encoded.errors == [None] * 5


def test_text_that_is_not_there(led_directory: Path) -> None:
    blanks = ["", " ", "\n\t \r\n", "\u00a0\u3000", "\x0b\x0c"]
    encoded = encode(task_of(led_directory), [None, *blanks, "there"])
    assert kinds(encoded) == ["NullText", *["EmptyText"] * len(blanks), None]
    assert all(e["stage"] == "read" for e in encoded.errors if e)
    for column in ("input_ids", "num_tokens_in", "num_windows", "truncated", "coverage"):
        assert getattr(encoded, column).is_null().to_pylist() == [True] * 6 + [False]


def test_strange_text_is_good_text(led_directory: Path) -> None:
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    strange = {
        "control": "a\x00b\x01\x07\x1b[31m\x7f",
        "only control": "\x00\x01",
        "emoji": "👩‍👩‍👧‍👦 family 🇪🇺 \U0001f9ff",
        "right to left": "שלום עולם \u202eabc\u202c مرحبا بالعالم",
        "combining": "e\u0301" * 20,
        "zero width": "\u200b\ufeff",
        "special": "</s> <s> <pad> <mask> <unk>",
        "astral": "\U0010ffff\ue000\ufffe",
    }
    encoded = encode(task_of(led_directory, max_source_tokens=512), list(strange.values()))
    assert dict(zip(strange, kinds(encoded), strict=True)) == dict.fromkeys(strange)
    assert encoded.input_ids.to_pylist() == [tokenizer.encode(t) for t in strange.values()]


def test_bytes_that_are_not_utf8_fail_their_row_only(led_directory: Path) -> None:
    broken = [b"\xff\xfe", b"cut \xe2\x82", b"surrogate \xed\xa0\x80", b"latin caf\xe9"]
    rows = [b"before", *broken, None, b"  ", b"after"]
    task = task_of(led_directory)
    encoded = encode(task, invalid_utf8(rows))
    assert kinds(encoded) == [None, *["ReadError"] * 4, "NullText", "EmptyText", None]
    assert all("UTF-8" in e["message"] for e in encoded.errors[1:5] if e)
    alone = encode(task, ["before", "after"]).input_ids.to_pylist()
    assert [ids for ids in encoded.input_ids.to_pylist() if ids] == alone


@pytest.mark.parametrize("rows", [[], [None], [""], [None, None]])
def test_blocks_without_a_single_text(led_directory: Path, rows: list[str | None]) -> None:
    encoded = encode(task_of(led_directory), rows)
    assert len(encoded.input_ids) == len(encoded.errors) == len(rows)
    assert encoded.input_ids.null_count == len(rows)
    assert encoded.truncated.type == pa.bool_()
    assert encoded.coverage.type == pa.float64()


def test_slices_and_chunks_are_read_from_their_own_place(led_directory: Path) -> None:
    task = task_of(led_directory)
    texts = [*[t[:90] for t in corpus_texts(6)], None, ""]
    whole = pa.array(texts, pa.large_string())
    expected = encode(task, whole)
    encoded = task.load_encoder()(pa.chunked_array([whole[:1], whole[1:1], whole[1:5], whole[5:]]))
    assert encoded.input_ids.to_pylist() == expected.input_ids.to_pylist()
    assert encoded.errors == expected.errors
    tail = encode(task, whole[3:])
    assert tail.input_ids.to_pylist() == expected.input_ids.to_pylist()[3:]


def test_a_cut_keeps_the_end_token_and_says_so(led_directory: Path) -> None:
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    text = corpus_texts(1, 500)[0]
    ids = tokenizer.encode(text)
    encoded = encode(task_of(led_directory, max_source_tokens=40), [text, "short"])
    assert encoded.input_ids.to_pylist()[0] == [*ids[:39], 2]
    assert encoded.num_tokens_in.to_pylist()[0] == len(ids)
    assert encoded.truncated.to_pylist() == [True, False]
    assert encoded.coverage.to_pylist() == [38 / (len(ids) - 2), 1.0]


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.none() | st.integers(0, 30), max_size=12), limit=st.integers(3, 24))
def test_counts_of_any_block(led_directory: Path, rows: list[int | None], limit: int) -> None:
    # "a" is one token and so is every " a": the number of tokens is known beforehand.
    texts = [None if n is None else " ".join(["a"] * n) for n in rows]
    encoded = encode(task_of(led_directory, max_source_tokens=limit), texts)
    for row, n in enumerate(rows):
        ids = encoded.input_ids[row].as_py()
        if not n:
            assert ids is None
            assert encoded.num_tokens_in[row].as_py() is None
            assert kinds(encoded)[row] == ("NullText" if n is None else "EmptyText")
            continue
        seen = min(n, limit - 2)
        assert encoded.num_tokens_in[row].as_py() == n + 2
        assert (len(ids), ids[0], ids[-1]) == (seen + 2, 0, 2)
        assert encoded.coverage[row].as_py() == seen / n
        assert encoded.truncated[row].as_py() == (seen < n)


def test_on_long_error(led_directory: Path) -> None:
    texts = ["a " * 100, "a b c", None, "a b c d"]
    encoded = encode(task_of(led_directory, max_source_tokens=5, on_long="error"), texts)
    assert kinds(encoded) == ["TooLong", None, "NullText", "TooLong"]
    assert encoded.errors[3] == {
        "stage": "tokenize",
        "type": "TooLong",
        "message": "6 tokens, max_source_tokens is 5; cut it or raise the limit",
    }
    assert encoded.num_tokens_in.to_pylist()[1:] == [5, None, 6]
    assert encoded.input_ids.is_null().to_pylist() == [True, False, True, True]
    assert encoded.truncated.to_pylist() == [None, False, None, None]


# --- generating ---


def test_a_worker_answers_every_document_with_its_own_summary(led_directory: Path) -> None:
    task = task_of(led_directory)
    texts = [text[:200] for text in corpus_texts(6)]
    documents = [
        (f"row {i}", ids) for i, ids in enumerate(encode(task, texts).input_ids.to_pylist())
    ]
    worker = pickle.loads(pickle.dumps(task)).load_worker("cpu", 2, 0.5)
    calls = []
    together = dict(worker(documents, lambda: calls.append(1)))
    assert sorted(together) == list(range(6))
    assert len({output.columns["summary"] for output in together.values()}) == 6
    assert calls
    for index, document in enumerate(documents):
        ((_, alone),) = worker([document], lambda: None)
        assert alone == together[index]
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
    documents = [("row", [0, *range(100, 130), 2])]
    found: dict[str, int] = {}

    def run() -> None:
        worker = task_of(led_directory).load_worker("cpu", 3, 0.5)
        encode = worker.model.encode

        def counting(input_ids: Any, layout: Any) -> Any:
            found[threading.current_thread().name] = _openmp_threads()
            return encode(input_ids, layout)

        worker.model.encode = counting  # type: ignore[method-assign]
        assert len(list(worker(documents, lambda: None))) == 1

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
        if "libgomp" in line
    )
    return int(ctypes.CDLL(library).omp_get_max_threads())


def test_the_memory_is_shared(led_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document beyond a worker's share fails alone, and what fits in it is decoded."""
    monkeypatch.setattr(memory, "available_bytes", lambda _: 2**30)
    documents = [("row", [0, *range(100, 130), 2])]
    ((_, output),) = task_of(led_directory).load_worker("cpu", 2, 0.5)(documents, lambda: None)
    assert output.error is None
    ((_, output),) = task_of(led_directory).load_worker("cpu", 2, 1e-5)(documents, lambda: None)
    assert isinstance(output.error, OutOfMemoryError)


def test_several_blocks_at_once_give_the_same_rows(led_directory: Path) -> None:
    task = task_of(led_directory)
    texts = [text[: 100 + 20 * i] for i, text in enumerate(corpus_texts(24))]
    rows = [(f"row {i}", ids) for i, ids in enumerate(encode(task, texts).input_ids.to_pylist())]
    worker = task.load_worker("cpu", 2, 0.5)
    one_by_one = [dict(worker([row], lambda: None))[0] for row in rows]
    with ThreadPoolExecutor(3) as pool:
        blocks = [rows[i : i + 6] for i in range(0, 24, 6)]
        found = list(pool.map(lambda block: dict(worker(block, lambda: None)), blocks))
    assert [block[i] for block in found for i in range(6)] == one_by_one


def test_an_end_at_once_is_an_empty_summary(led_directory: Path) -> None:
    generation = task_of(led_directory).generation.replace(
        forced_bos_token_id=0, forced_eos_token_id=2, max_new_tokens=2, num_beams=1
    )
    task = task_of(led_directory, generation=generation)
    ((_, output),) = task.load_worker("cpu", 2, 0.5)([("x", [0, 100, 2])], lambda: None)
    assert output.columns == {"summary": ""}
    assert output.num_tokens_out == 0


def test_sampling_depends_on_the_row_and_the_seed_alone(led_directory: Path) -> None:
    sampling = task_of(led_directory).generation.replace(do_sample=True, num_beams=1)
    worker = task_of(led_directory, generation=sampling).load_worker("cpu", 2, 0.5)
    ids = encode(task_of(led_directory), [corpus_texts(1)[0][:300]]).input_ids.to_pylist()[0]
    rows = [(name, ids) for name in "abcd"]
    first = {i: o.columns["summary"] for i, o in worker(rows, lambda: None)}
    assert len(set(first.values())) == 4
    reverse = {i: o.columns["summary"] for i, o in worker(rows[::-1], lambda: None)}
    assert reverse == {3 - i: text for i, text in first.items()}
    other = task_of(led_directory, generation=sampling, seed=1).load_worker("cpu", 2, 0.5)
    assert {i: o.columns["summary"] for i, o in other(rows, lambda: None)} != first


def test_a_row_seed_never_changes() -> None:
    assert row_seed(0, "a.parquet#0") == 3004585536999514966
    names = [f"row {i}" for i in range(1000)]
    seeds = {row_seed(seed, name) for seed in (0, 1, -1) for name in names}
    assert len(seeds) == 3000
    assert all(0 <= s < 2**63 for s in seeds)
    # The seed and the name do not run together.
    assert row_seed(1, "1x") != row_seed(11, "x")


# --- fingerprint ---


@pytest.fixture
def own_model(led_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(led_directory, tmp_path / "model"))


def test_a_fingerprint_comes_back_from_a_file_as_it_was(led_directory: Path) -> None:
    generation = GenerationConfig.from_pretrained(led_directory).replace(
        early_stopping="never", bad_words_ids=[[5, 6]], length_penalty=1e-5, eos_token_id=[2, 7]
    )
    fingerprint = task_of(led_directory, generation=generation).fingerprint()
    assert differences(yaml.safe_load(yaml.safe_dump(fingerprint)), fingerprint) == []
    assert json.loads(json.dumps(fingerprint)) == fingerprint


def test_what_a_fingerprint_tells_apart(led_directory: Path) -> None:
    task = task_of(led_directory)
    before = task.fingerprint()
    sampling = task.generation.replace(do_sample=True, num_beams=1)
    changes = {
        "num_beams": {"generation": task.generation.replace(num_beams=3)},
        "length_penalty": {"generation": task.generation.replace(length_penalty=1.1)},
        "max_source_tokens": {"max_source_tokens": 65},
        "on_long": {"on_long": "error"},
        "dtype": {"dtype": "bfloat16"},
        "do_sample": {"generation": sampling},
    }
    for name, change in changes.items():
        told = differences(before, dataclasses.replace(task, **change).fingerprint())
        assert any(name in line for line in told), name
    for same in ({"batch_tokens": 5}, {"seed": 5}):
        assert dataclasses.replace(task, **same).fingerprint() == before
    drawn = task_of(led_directory, generation=sampling)
    assert differences(drawn.fingerprint(), dataclasses.replace(drawn, seed=5).fingerprint()) == [
        "options.seed was 0, is 5"
    ]


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
