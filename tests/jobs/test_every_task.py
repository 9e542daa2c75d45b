"""Each batch task as a process: what it prints where, and what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipelines.run_directory.directory import read_manifest
from pipelines.storage import locate
from tests.pipelines.driving import ROOT, rows_of
from tests.pipelines.every_task import CASES, LIMIT, command, flags, good_rows, write_rows


def run(words: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """A command in a process of its own, with a Ray of its own if it needs one."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    name, *rest = words
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *rest],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240.0,
    )


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_one_json_object(
    name: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    case, model = CASES[name], model_of(name)
    rows = [*good_rows(5), good_rows(1, 400)[0] | {"id": "long"}]
    corpus = write_rows(tmp_path / "in" / "rows.parquet", rows)
    words = flags(case, model, corpus, tmp_path / "run", dry_run=True, format="json")
    done = run([*words, "--max-source-tokens", str(LIMIT)])
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["task"], plan["rows"], plan["id"]) == (name, 6, "id")
    assert plan["columns"] == {role: [column] for role, column in case.columns.items()}
    sampled = plan["sampled"]
    assert (sampled["rows"], sampled["truncated"], sampled["with errors"]) == (6, 1, 0)
    assert sum(sampled["lengths"].values()) == 6
    assert not (tmp_path / "run").exists()


def test_a_report_alone_is_on_stdout(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    corpus = write_rows(
        tmp_path / "in" / "rows.parquet",
        [*good_rows(7), good_rows(1)[0] | {"id": "x", "text": None}],
    )
    words = flags(CASES["tag"], model_of("tag"), corpus, tmp_path / "run", format="json")
    done = run([*words, "--max-errors", "1"])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    manifest = read_manifest(locate(str(tmp_path / "run")))
    assert report.items() >= json.loads(manifest.model_dump_json(by_alias=True)).items()
    assert report["rows"] == {"in": 8, "ok": 7, "failed": 1, "truncated": 0}
    assert sum(report["lengths"].values()) == 7
    assert "8 rows; 1 worker(s) on cpu" in done.stderr
    assert len(rows_of(tmp_path / "run")) == 8
    # Completed: the same command shows the report again.
    again = run(words)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["resumed_rows"] == 8


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("answer", "summarize"),
        ("answer", "classify"),
        ("classify", "tag"),
        ("tag", "choose"),
        ("choose", "fill"),
        ("fill", "answer"),
    ],
)
def test_a_model_of_another_task_is_refused_with_its_own(
    asked: str,
    given: str,
    model_of: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus = write_rows(tmp_path / "in" / "rows.parquet", good_rows(3))
    assert command(flags(CASES[asked], model_of(given), corpus, tmp_path / "run")) == 2
    assert f"this one fits the task {given}, and embed" in capsys.readouterr().err
    words = flags(CASES["embed"], model_of(given), corpus, tmp_path / "run", dry_run=True)
    assert command(words) == 0


@pytest.mark.parametrize("name", [n for n in CASES if len(CASES[n].columns) > 1])
def test_a_column_that_is_not_there_is_refused(
    name: str,
    model_of: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES[name]
    rows = [{"id": row["id"], "text": row["text"]} for row in good_rows(3)]
    corpus = write_rows(tmp_path / "in" / "rows.parquet", rows)
    assert command(flags(case, model_of(name), corpus, tmp_path / "run")) == 2
    told = capsys.readouterr().err
    missing = [repr(column) for column in case.columns.values() if column != "text"]
    assert f"no column {', '.join(missing)}; it has 'id', 'text'" in told


def test_too_many_failed_rows_are_exit_code_3(
    model_of: Callable[[str], Path], ray_session: None, tmp_path: Path
) -> None:
    rows = [row | {"text": None} for row in good_rows(3)]
    corpus = write_rows(tmp_path / "in" / "rows.parquet", [*rows[:2], good_rows(4)[3]])
    words = flags(CASES["embed"], model_of("embed"), corpus, tmp_path / "run")
    assert command([*words, "--max-errors", "1"]) == 3
    assert command([*words, "--max-errors", "2"]) == 0
