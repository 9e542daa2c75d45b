"""Each batch task over a corpus with bad rows, killed half way, and in several windows."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.rows import output_schema
from pipelines.run_directory.directory import read_manifest
from pipelines.storage import locate
from tests.pipelines.driving import Driver, num_committed, rows_of, wait_for
from tests.pipelines.every_task import (
    CASES,
    LIMIT,
    Case,
    assert_same,
    bad_rows,
    command,
    flags,
    good_rows,
    make_task,
    write_rows,
)
from tests.pipelines.tasks.heads import answers

NUM_GOOD = 20


def by_roles(case: Case, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {role: [row[column] for row in rows] for role, column in case.columns.items()}


def assert_answered(
    case: Case, model: Path, rows: list[dict[str, Any]], found: dict[str, Any], **options: Any
) -> None:
    """The rows of a run say what the task says of them in this process, and tell rows apart."""
    expected = answers(make_task(case, model, **options), **by_roles(case, rows))
    for row, answer in zip(rows, expected, strict=True):
        here = {name: found[row["id"]][name] for name in answer}
        assert_same(here, answer, f"{case.name} of {row['id']}")
    told = {repr([found[row["id"]][column] for column in case.types]) for row in rows}
    assert len(told) > len(rows) // 2


@pytest.mark.parametrize("name", CASES)
def test_a_dirty_corpus(
    name: str,
    model_of: Callable[[str], Path],
    ray_session: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case, model = CASES[name], model_of(name)
    good, bad = good_rows(NUM_GOOD), bad_rows(case)
    rows = [row for row, _ in bad.values()]
    # Bad ones among the good, and a block that has no other.
    rows = [*good[:5], *rows[:3], *good[5:], *rows[3:]]
    corpus = write_rows(tmp_path / "in" / "rows.parquet", rows, groups=[9, len(rows) - 9])
    limits: dict[str, Any] = {"max_source_tokens": LIMIT, "on_long": "error"}
    given = {**limits, "rows_per_block": 4, "max_errors": str(len(bad)), "keep_as": "query=asked"}
    output = tmp_path / "run"
    assert command(flags(case, model, corpus, output, **given, format="json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["errors"] == Counter(kind for _, kind in bad.values())
    found = rows_of(output)
    assert found.keys() == {row["id"] for row in rows}
    errors = {name: row["error"]["type"] for name, row in found.items() if row["error"]}
    assert errors == {name: kind for name, (_, kind) in bad.items()}
    for row_id in bad:
        assert all(found[row_id][column] is None for column in case.types)
        assert found[row_id]["truncated"] is None
    assert_answered(case, model, good, found, **limits)
    manifest = read_manifest(locate(str(output)))
    assert (manifest.rows.ok, manifest.rows.failed) == (NUM_GOOD, len(bad))
    task = make_task(case, model, **limits)
    assert dict(zip(task.columns.names, task.columns.types, strict=True)) == case.types
    schema = output_schema(task.columns, pa.schema([("asked", pa.large_string())]))
    for file in manifest.files:
        read = pq.read_schema(output / file.path)
        assert (read.names, read.types) == (schema.names, schema.types)
    dead = pq.read_table(output / "dead_letter")
    assert sorted(dead["id"].to_pylist()) == sorted(bad)
    assert {*case.columns.values(), "query", "error"} <= {*dead.column_names}


@pytest.mark.parametrize(
    "name",
    ["answer", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "answer")],
)
def test_killed_half_way_and_started_again(
    name: str, model_of: Callable[[str], Path], ray_session: None, tmp_path: Path
) -> None:
    case, model = CASES[name], model_of(name)
    rows = good_rows(240)
    rows[::6] = good_rows(240, 400)[::6]  # several windows each
    corpus = write_rows(tmp_path / "in" / "rows.parquet", rows, groups=[80, 80, 80])
    limits = {"on_long": "windows", "window_tokens": 128}
    output = tmp_path / "run"
    words = flags(case, model, corpus, output, **limits, rows_per_block=3)
    driver = Driver(tmp_path / "log.txt", f"jobs.{name}", *words[1:])
    try:
        wait_for(
            lambda: num_committed(output) >= 40 or driver.process.poll() is not None,
            "half of the blocks",
        )
        assert driver.process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
    finally:
        driver.kill()
    assert not (output / "_SUCCESS").exists()
    done = num_committed(output)
    assert 40 <= done < 72, f"{done} of 80 blocks were done when it was killed"
    assert command(words) == 0
    found = rows_of(output)
    assert found.keys() == {row["id"] for row in rows}
    assert sum(row["num_windows"] > 1 for row in found.values()) >= 40
    assert_answered(case, model, rows, found, **limits)


@pytest.mark.parametrize("name", CASES)
def test_documents_of_several_windows(
    name: str, model_of: Callable[[str], Path], ray_session: None, tmp_path: Path
) -> None:
    case, model = CASES[name], model_of(name)
    rows = good_rows(6, 350)
    corpus = write_rows(tmp_path / "in" / "rows.parquet", rows)
    limits: dict[str, Any] = {"on_long": "windows", "window_tokens": 128, "stride_tokens": 20}
    output = tmp_path / "run"
    assert command(flags(case, model, corpus, output, **limits)) == 0
    found = rows_of(output)
    assert len(found) == len(rows)
    for row in found.values():
        assert row["num_windows"] >= 4
        assert (row["coverage"], row["truncated"], row["error"]) == (1.0, False, None)
    assert_answered(case, model, rows, found, **limits)
