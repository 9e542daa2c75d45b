"""Documents that go wrong cost themselves and nobody else: every other row is as in a clean run."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from jobs.options import exit_code
from longformer_core.tokenization.tokenizer import LEDTokenizerFast
from pipelines.batch import BatchOptions, Report, run_batch
from pipelines.corpus.listing import list_corpus
from pipelines.errors import BudgetExceeded
from pipelines.rows import InputColumn, output_schema
from pipelines.run_directory.schemas import Manifest, Status
from tests.helpers import corpus_texts, make_led_directory
from tests.pipelines.drive import drive, make_task
from tests.pipelines.driving import begun, rows_of, summaries
from tests.pipelines.parquet import destroy_page, invalid_utf8, write

POISON, EXPLODE = "\x7f", "\x06"
MAX_SOURCE_TOKENS, BLOCK = 192, 8
NUM_PLAIN = 44
# id -> the error that the row must end with: stage and type.
EXPECTED = {
    "null": ("read", "NullText"),
    "empty": ("read", "EmptyText"),
    "blank": ("read", "EmptyText"),
    "not utf8": ("read", "ReadError"),
    "explodes": ("generate", "ModelError"),
    "poison": ("generate", "NonFinite"),
    "page 0": ("read", "ReadError"),
    "page 1": ("read", "ReadError"),
    "page 2": ("read", "ReadError"),
}
STRANGE = {
    "huge": "",  # two million characters, made below
    "control": "a bell\x07, a null\x00, an escape\x1b[31m and more\x01\x02",
    "emoji": "👩‍👩‍👧‍👦 had 🍕 in 🇪🇺 \U0001f9ff" * 5,
    "right to left": "שלום עולם \u202eabc\u202c مرحبا بالعالم " * 5,
    "end token": "An </s> in the text, a <mask> and a <pad> too.",
}


def plain_texts(n: int) -> list[str]:
    words = " ".join(corpus_texts(6)).replace(POISON, "").replace(EXPLODE, "").split()
    return [" ".join(words[100 * i : 100 * i + 50 + i]) for i in range(n)]


def good_rows() -> dict[str, str]:
    huge = " ".join(plain_texts(NUM_PLAIN))
    strange = STRANGE | {"huge": (huge * (2_000_000 // len(huge) + 1))[:2_000_000]}
    plain = plain_texts(NUM_PLAIN)
    return strange | {f"plain {i}": text for i, text in enumerate(plain)}


def bad_rows() -> dict[str, bytes | None]:
    return {
        "null": None,
        "empty": b"",
        "blank": "\u00a0 \n\t\u3000".encode(),
        "not utf8": b"caf\xe9 au lait",
        "explodes": f"this one {EXPLODE} goes off".encode(),
        "poison": f"this one holds a {POISON} character".encode(),
    }


def year_of(name: str) -> int:
    return 1900 + hashlib.md5(name.encode()).digest()[0]


def write_rows(path: Path, rows: dict[str, Any], **options: Any) -> Path:
    texts = [text.encode() if isinstance(text, str) else text for text in rows.values()]
    columns = {"id": list(rows), "text": invalid_utf8(texts), "year": [*map(year_of, rows)]}
    return write(path, pa.table(columns), **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LED whose encoder knows one token by NaN alone; its other embeddings are sound."""
    folder = make_led_directory(tmp_path_factory.mktemp("poisoned") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["led.shared.weight"]
    poisoned = embedding.clone()
    (token,) = LEDTokenizerFast.from_pretrained(folder).encode(POISON)[1:-1]
    poisoned[token] = torch.nan
    weights["led.encoder.embed_tokens.weight"] = poisoned
    weights["led.decoder.embed_tokens.weight"] = embedding.clone()
    weights["lm_head.weight"] = embedding.clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(source: Path, output: Path, model: Path, *, max_errors: str = "1%", **task: Any) -> Report:
    given = {"max_source_tokens": MAX_SOURCE_TOKENS, "no_repeat_ngram_size": None}
    accident = make_task(str(model), {"max_new_tokens": 8}, given | task)
    corpus = list_corpus(
        [str(source)], inputs=accident.inputs, id_column=None, kept={"year": "published"}
    )
    options = BatchOptions(device="cpu", rows_per_block=4, max_errors=max_errors)
    return run_batch(accident, corpus, str(output), options=options)


@pytest.fixture(scope="module")
def clean(
    ray_session: None, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The rows of a run over the good documents alone, with nothing failing at all."""
    folder = tmp_path_factory.mktemp("clean")
    write_rows(folder / "in" / "a.parquet", good_rows())
    report = run(folder / "in", folder / "run", model)
    assert report.manifest.rows.failed == 0
    rows = rows_of(folder / "run")
    # Rows that are all alike could not show that one took another's place.
    assert len({row["summary"] for row in rows.values()}) > 0.8 * len(rows)
    return rows


@pytest.fixture(scope="module")
def faulty(ray_session: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over good and bad documents, mixed."""
    folder = tmp_path_factory.mktemp("faulty")
    bad, rows = iter(bad_rows().items()), {}
    for number, (name, text) in enumerate(good_rows().items()):
        rows[name] = text
        if number % 7 == 0:
            rows.update([next(bad)] if number // 7 < len(bad_rows()) else [])
    assert rows.keys() == good_rows().keys() | bad_rows().keys()
    write_rows(folder / "in" / "a.parquet", rows, groups=[20, 20, len(rows) - 40])
    page = {f"page {i}": f"text {i}" for i in range(3)}
    destroy_page(write_rows(folder / "in" / "b.parquet", page), "text")
    report = run(folder / "in", folder / "run", model, explode=EXPLODE, max_errors="9")
    assert report.manifest.status == "completed"
    return folder / "run"


# --- one run with everything in it ---


def test_every_good_row_is_as_in_a_clean_run(
    faulty: Path, clean: dict[str, dict[str, Any]]
) -> None:
    rows = rows_of(faulty)
    assert rows.keys() == clean.keys() | EXPECTED.keys()
    assert {name: row for name, row in rows.items() if row["error"] is None} == clean
    assert clean["huge"]["truncated"]
    assert clean["huge"]["num_tokens_in"] > 100_000
    assert clean["huge"]["coverage"] == pytest.approx(
        (MAX_SOURCE_TOKENS - 2) / (clean["huge"]["num_tokens_in"] - 2)
    )
    assert all(row["published"] == year_of(name) for name, row in rows.items())


def test_every_bad_row_says_where_and_why(faulty: Path) -> None:
    rows = rows_of(faulty)
    failed = {name: row for name, row in rows.items() if row["error"] is not None}
    told = {name: (row["error"]["stage"], row["error"]["type"]) for name, row in failed.items()}
    assert told == EXPECTED
    for row in failed.values():
        for name in ("summary", "num_tokens_out", "num_windows", "truncated", "coverage"):
            assert row[name] is None
        assert row["error"]["message"]
    assert "an exception on this document" in failed["explodes"]["error"]["message"]
    assert failed["page 1"]["error"]["message"].startswith("b.parquet, row group 0: ")
    # What was counted before the failure stays.
    known = {name for name, row in failed.items() if row["num_tokens_in"] is not None}
    assert known == {"explodes", "poison"}


def test_the_files_keep_the_contract(faulty: Path) -> None:
    manifest = Manifest.model_validate_json((faulty / "_manifest.json").read_bytes())
    status = Status.model_validate_json((faulty / "status.json").read_bytes())
    rows = rows_of(faulty)
    assert (faulty / "_SUCCESS").exists()
    assert manifest.status == status.status == "completed"
    assert manifest.run_id == status.run_id
    assert (manifest.rows.rows_in, manifest.rows.ok, manifest.rows.failed) == (58, 49, 9)
    assert (status.rows.rows_in, status.rows.ok, status.rows.failed) == (58, 49, 9)
    assert manifest.errors == Counter(kind for _, kind in EXPECTED.values())
    assert manifest.rows.truncated == sum(bool(row["truncated"]) for row in rows.values()) >= 1
    for column, told in (("in", manifest.tokens.tokens_in), ("out", manifest.tokens.out)):
        assert told == sum(row[f"num_tokens_{column}"] or 0 for row in rows.values())
    assert [(f.path, f.rows) for f in manifest.input] == [("a.parquet", 55), ("b.parquet", 3)]
    assert {f.path for f in manifest.files} == {
        f"output/{p.name}" for p in (faulty / "output").iterdir()
    }
    summary = pa.schema([("summary", pa.large_string())])
    schema = output_schema(summary, pa.schema([("published", pa.int64())]))
    for entry in manifest.files:
        data = (faulty / entry.path).read_bytes()
        assert (entry.bytes, entry.xxh64) == (len(data), xxhash.xxh64(data).hexdigest())
        table = pq.read_table(faulty / entry.path)
        assert table.num_rows == entry.rows
        # Parquet files of Ray know no column that must not be null.
        assert table.schema.names == schema.names
        assert table.schema.types == schema.types


def test_failed_rows_can_be_run_again_alone(faulty: Path, model: Path, tmp_path: Path) -> None:
    files = sorted((faulty / "dead_letter").iterdir())
    assert [f.name for f in files] == ["000000.parquet", "000001.parquet"]
    table = pa.concat_tables([pq.read_table(f) for f in files])
    assert table.column_names == ["id", "text", "year", "error"]
    texts = dict(
        zip(table["id"].to_pylist(), table["text"].cast(pa.large_binary()).to_pylist(), strict=True)
    )
    assert texts == bad_rows() | {"page 0": None, "page 1": None, "page 2": None}
    assert table["year"].to_pylist() == [year_of(name) for name in texts]
    rows = rows_of(faulty)
    assert table["error"].to_pylist() == [rows[name]["error"] for name in texts]
    # Whatever made one document explode has been mended since.
    report = run(faulty / "dead_letter", tmp_path / "run", model, max_errors="100%")
    again = rows_of(tmp_path / "run")
    assert again.keys() == texts.keys()
    assert {name for name, row in again.items() if row["error"] is None} == {"explodes"}
    assert again["explodes"]["summary"]
    assert again["page 1"]["error"]["type"] == "NullText"
    assert report.manifest.rows.failed == 8


# --- a document that ends its process ---


def test_a_document_that_kills_its_worker_is_given_up(
    ray_session: None,
    corpus: Path,
    led_directory: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
) -> None:
    tokenizer = LEDTokenizerFast.from_pretrained(led_directory)
    listed = list_corpus(
        [str(corpus)], inputs=[InputColumn("text", ("text",))], id_column=None, kept={}, limit=140
    )
    tables = [pq.read_table(corpus / f.name).slice(0, f.num_rows) for f in listed.files]
    rows = {row["id"]: row["text"] for row in pa.concat_tables(tables).to_pylist()}
    tokens = {name: set(tokenizer.encode(text)[:500]) for name, text in rows.items()}
    seen = Counter(token for text in rows.values() for token in set(tokenizer.encode(text)))
    victim, word = next(
        (name, word)
        for name in list(rows)[60:]
        for word in rows[name].split()
        # Of one token no other document knows: the worker sees a pack's tokens, not a document's.
        if (ids := set(tokenizer.encode(" " + word)[1:-1])) <= tokens[name]
        and any(seen[token] == 1 for token in ids)
    )
    journal, output = tmp_path / "journal", tmp_path / "run"
    journal.mkdir()
    report = drive(
        corpus=str(corpus),
        output=str(output),
        model=str(led_directory),
        limit=140,
        rows_per_block=BLOCK,
        task={"kill": word, "journal": str(journal), "company_s": 5.0},
    )
    assert report.manifest.errors == {"WorkerDied": 1}
    found = summaries(output)
    assert len(found) == 140
    assert found.pop(victim) is None
    assert found.items() <= undisturbed.items()
    num_workers = len(list(journal.glob("*.log")))
    assert 3 <= num_workers <= 4, f"{num_workers - 1} deaths"
    times = begun(journal)
    assert times[victim] == 2
    # The block that ran beside the victim's began again too, and none of its documents failed.
    assert sum(times[name] > 1 for name in rows) > BLOCK, "the process died with one block in it"


# --- the error budget ---


def test_a_spent_budget_ends_the_run_and_a_larger_one_completes_it(
    model: Path, clean: dict[str, dict[str, Any]], tmp_path: Path, capsys: Any
) -> None:
    """1 % of 40 rows is no row at all: the first failed one ends the run."""
    plain = dict(list(good_rows().items())[-38:])
    tokenizer = LEDTokenizerFast.from_pretrained(model)
    long = {f"long {i}": "too long " * 200 for i in range(2)}
    short = {name for name, text in plain.items() if len(tokenizer.encode(text)) <= 192}
    write_rows(tmp_path / "in" / "a.parquet", long | plain)
    num_long = 40 - len(short)
    output, journal = tmp_path / "run", tmp_path / "journal"
    journal.mkdir()
    options = {"on_long": "error", "journal": str(journal)}
    code = exit_code(lambda: run(tmp_path / "in", output, model, **options))
    assert code == BudgetExceeded.exit_code == 3
    message = capsys.readouterr().err
    assert "TooLong), more than --max-errors" in message
    assert "max_source_tokens is 192" in message
    status = Status.model_validate_json((output / "status.json").read_bytes())
    assert status.status == "failed"
    assert status.rows.failed >= 2
    assert "TooLong" in status.message
    assert not (output / "_SUCCESS").exists()
    dead = pq.read_table(output / "dead_letter").to_pylist()
    assert len(dead) == status.rows.failed
    assert {"long 0", "long 1"} <= {row["id"] for row in dead}
    assert Manifest.model_validate_json((output / "_manifest.json").read_bytes()).status == "failed"
    first = begun(journal)
    assert 0 < len(first) < len(short), "the run went on after its budget was spent"
    # Still too little, told without work; then enough.
    assert exit_code(lambda: run(tmp_path / "in", output, model, max_errors="1", **options)) == 3
    assert begun(journal) == first
    report = run(tmp_path / "in", output, model, max_errors=str(num_long), **options)
    assert report.manifest.errors == {"TooLong": num_long}
    assert begun(journal) == Counter(short), "a finished row was worked on again"
    rows = rows_of(output)
    assert {n: row for n, row in rows.items() if row["error"] is None} == {
        n: clean[n] for n in short
    }
    assert {row["error"]["type"] for n, row in rows.items() if n not in short} == {"TooLong"}
    assert len(pq.read_table(output / "dead_letter")) == num_long
    assert (output / "_SUCCESS").exists()
