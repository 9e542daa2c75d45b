"""`longhaul retry`: the failed rows of a run again, with its options and changed ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipelines.driving import rows_of
from tests.pipelines.every_task import (
    CASES,
    Case,
    assert_same,
    command,
    flags,
    good_rows,
    make_task,
    write_rows,
)
from tests.pipelines.tasks.heads import answers

LIMITS = {"on_long": "error", "max_source_tokens": 128}


def long_and_short() -> list[dict[str, Any]]:
    """Rows of which every third is longer than the limit."""
    rows = good_rows(12, 30)
    for row, longer in zip(rows[::3], good_rows(12, 300)[::3], strict=True):
        row |= longer
    return rows


def test_failed_rows_succeed_with_other_options(
    model_of: Callable[[str], Path], ray_session: None, tmp_path: Path
) -> None:
    case, rows = CASES["answer"], long_and_short()
    corpus = write_rows(tmp_path / "in" / "rows.parquet", rows)
    run = tmp_path / "run"
    given = LIMITS | {"max_errors": "4", "keep_as": "query=asked"}
    assert command(flags(case, model_of("answer"), corpus, run, **given)) == 0
    failed = {name for name, row in rows_of(run).items() if row["error"] is not None}
    assert failed == {row["id"] for row in rows[::3]}
    changes = ["--set", "on_long=truncate", "--set", "max-errors=0", "--set", "max_answer_tokens=5"]
    assert command(["retry", str(run), *changes]) == 0
    again = rows_of(tmp_path / "run-retry")
    assert again.keys() == failed
    options = {"max_source_tokens": 128, "max_answer_tokens": 5}
    task = make_task(case, model_of("answer"), **options)
    columns = {r: [row[c] for row in rows[::3]] for r, c in case.columns.items()}
    for row, expected in zip(rows[::3], answers(task, **columns), strict=True):
        found = again[row["id"]]
        assert_same({name: found[name] for name in expected}, expected)
        assert (found["truncated"], found["asked"]) == (True, row["query"])
    # Of the new run no row failed: there is nothing to run again.
    assert command(["retry", str(tmp_path / "run-retry")]) == 2


def test_made_ids_joined_columns_and_an_instruction(
    model_of: Callable[[str], Path],
    ray_session: None,
    tmp_path: Path,
) -> None:
    case, rows = CASES["embed"], long_and_short()
    titled = [{"title": f"no {i}", "text": row["text"]} for i, row in enumerate(rows)]
    titled[6]["title"] = None
    for part in range(2):
        write_rows(tmp_path / "in" / f"{part}.parquet", titled[part::2])
    run = tmp_path / "run"
    joined = {"text_columns": "title,text", "separator": "", "instruction": "Note: "}
    words = flags(case, model_of("embed"), tmp_path / "in", run, **LIMITS, **joined)
    assert command([*words, "--max-errors", "50%"]) == 0
    failed = {name for name, row in rows_of(run).items() if row["error"] is not None}
    assert failed == {"0.parquet#0", "1.parquet#1", "0.parquet#3", "1.parquet#4"}
    assert yaml.safe_load((run / "config.yaml").read_text())["options"]["separator"] == ""
    elsewhere = tmp_path / "elsewhere"
    changes = ["--output", str(elsewhere), "--set", "on_long=truncate", "--set", "instruction=A: b"]
    assert command(["retry", str(run), *changes]) == 0
    again = rows_of(elsewhere)
    assert again.keys() == failed
    texts = ["A: b" + (row["title"] or "") + row["text"] for row in titled[::3]]
    expected = answers(make_task(case, model_of("embed"), max_source_tokens=128), text=texts)
    names = ["0.parquet#0", "1.parquet#1", "0.parquet#3", "1.parquet#4"]
    for name, answer in zip(names, expected, strict=True):
        assert_same({column: again[name][column] for column in answer}, answer)


def test_what_is_refused(
    model_of: Callable[[str], Path],
    ray_session: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case: Case = CASES["classify"]
    corpus = write_rows(tmp_path / "in" / "rows.parquet", good_rows(3))
    run = tmp_path / "run"
    assert command(flags(case, model_of("classify"), corpus, run)) == 0

    def refused(*words: str) -> str:
        capsys.readouterr()
        assert command(["retry", *words]) == 2
        return capsys.readouterr().err

    assert "has no dead letters" in refused(str(run))
    assert "is not the directory of a batch run" in refused(str(tmp_path / "in"))
    assert "is not the directory of a batch run" in refused(str(tmp_path / "nowhere"))
    (run / "dead_letter").mkdir()
    write_rows(run / "dead_letter" / "0.parquet", good_rows(2))
    assert "give option=value" in refused(str(run), "--set", "on_long")
    assert "--on-lung: unknown (did you mean" in refused(str(run), "--set", "on_lung=windows")
    assert "--max-source-tokens 'many'" in refused(str(run), "--set", "max_source_tokens=many")
