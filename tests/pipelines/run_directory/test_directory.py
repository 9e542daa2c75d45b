"""A run directory: what lies in it, and whose run it is."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipelines.errors import Refused
from pipelines.run_directory.directory import Run, differences, inspect_run, open_run
from pipelines.run_directory.ownership import Ownership
from pipelines.run_directory.schemas import (
    FileEntry,
    InputEntry,
    Manifest,
    ManifestRows,
    RowCounts,
    SkippedEntry,
    Status,
    TokenCounts,
)
from pipelines.storage import Location, locate
from tests.pipelines.owners import other_owner, owner_file

FINGERPRINT: dict[str, Any] = {
    "task": "summarize",
    "options": {"num_beams": 2},
    "input": {"a.parquet": {"rows": 2}, "b.parquet": {"rows": 1}},
}


# --- its files ---


def test_the_status_file(place: Location, quick: None) -> None:
    run = Run(place, "abc", 3)
    run.write_status("running", RowCounts(rows_in=9, ok=4, failed=1), TokenCounts(tokens_in=7))
    told = json.loads(Path(place.path, "status.json").read_text())
    assert list(told) == [
        "status",
        "run_id",
        "attempt",
        "rows",
        "tokens",
        "started",
        "updated",
        "message",
    ]
    assert told["rows"] == {"in": 9, "ok": 4, "failed": 1}
    assert told["tokens"] == {"in": 7, "out": 0}
    assert (told["status"], told["run_id"], told["attempt"]) == ("running", "abc", 3)
    assert told["started"] <= told["updated"] <= time.time()
    assert Status.model_validate(told).rows.rows_in == 9
    states = Status.model_fields["status"].annotation.__args__  # type: ignore[union-attr]
    assert states == ("validating", "running", "finalizing", "completed", "failed", "cancelled")
    with pytest.raises(ValidationError):
        Status.model_validate(told | {"status": "done"})
    with pytest.raises(ValidationError):
        Status.model_validate(told | {"eta": 5})


def test_the_manifest_file(place: Location) -> None:
    manifest = Manifest(
        run_id="abc",
        status="completed",
        fingerprint=FINGERPRINT,
        rows=ManifestRows(rows_in=3, ok=2, failed=1, truncated=1),
        errors={"NullText": 1},
        tokens=TokenCounts(tokens_in=5, out=4),
        timings={"graph_s": 1.5},
        versions={"python": "3"},
        input=[InputEntry(path="a.parquet", rows=3, bytes=99)],
        skipped=[SkippedEntry(path="b.parquet", reason="is empty")],
        files=[FileEntry(path="output/x.parquet", rows=3, bytes=88, xxh64="0f")],
    )
    Run(place, "abc", 1).write_manifest(manifest)
    told = json.loads(Path(place.path, "_manifest.json").read_text())
    assert told == {
        "schema_version": 1,
        "run_id": "abc",
        "status": "completed",
        "fingerprint": FINGERPRINT,
        "rows": {"in": 3, "ok": 2, "failed": 1, "truncated": 1},
        "errors": {"NullText": 1},
        "tokens": {"in": 5, "out": 4},
        "timings": {"graph_s": 1.5},
        "versions": {"python": "3"},
        "input": [{"path": "a.parquet", "rows": 3, "bytes": 99}],
        "skipped": [{"path": "b.parquet", "reason": "is empty"}],
        "files": [{"path": "output/x.parquet", "rows": 3, "bytes": 88, "xxh64": "0f"}],
    }
    assert list(told) == list(Manifest.model_fields)
    assert Manifest.model_validate(told) == manifest
    with pytest.raises(ValidationError):
        Manifest.model_validate(told | {"schema_version": 2})


def test_metrics_are_whole_files(place: Location) -> None:
    run = Run(place, "abc", 2)
    run.write_metrics([])
    run.write_metrics(['{"rows": 1}\n', '{"rows": 2}\n'])
    run.write_metrics(['{"rows": 3}\n'])
    folder = Path(place.path, "metrics")
    assert {p.name: len(p.read_text().splitlines()) for p in folder.iterdir()} == {
        "2-0.jsonl": 2,
        "2-1.jsonl": 1,
    }


# --- whose run it is ---


def started(place: Location, fingerprint: dict[str, Any] = FINGERPRINT) -> str:
    with open_run(place, fingerprint, {"num_beams": 2}, new_run=False) as run:
        return run.run_id


def test_a_new_directory(place: Location, quick: None) -> None:
    assert inspect_run(place, FINGERPRINT, new_run=True).run_id is None
    assert not Path(place.path).exists(), "looking must not write"
    with open_run(place, FINGERPRINT, {"num_beams": 2}, new_run=False) as run:
        assert run.attempt == 1
        assert owner_file(place).exists()
        config = yaml.safe_load(Path(place.path, "config.yaml").read_text())
    assert config == {
        "run_id": run.run_id,
        "options": {"num_beams": 2},
        "fingerprint": FINGERPRINT,
    }
    assert not owner_file(place).exists()
    assert sorted(p.name for p in Path(place.path).iterdir()) == ["config.yaml", "output"]


def test_an_attempt_that_died_before_its_config_is_no_obstacle(
    place: Location, quick: None
) -> None:
    place.join("output").make_directory()
    other_owner(place, heartbeat=0)
    assert inspect_run(place, FINGERPRINT, new_run=False).run_id is None
    started(place)


def test_the_same_run_goes_on(place: Location, quick: None) -> None:
    run_id = started(place)
    Run(place, run_id, 4).write_status("failed", RowCounts(), TokenCounts())
    found = inspect_run(place, FINGERPRINT, new_run=False)
    assert (found.run_id, found.attempt, found.completed) == (run_id, 4, False)
    with open_run(place, FINGERPRINT, {}, new_run=False) as run:
        assert (run.run_id, run.attempt) == (run_id, 5)
        run.mark_success()
    assert inspect_run(place, FINGERPRINT, new_run=False).completed
    Path(place.path, "status.json").write_text("{half")
    assert inspect_run(place, FINGERPRINT, new_run=False).attempt == 0


def test_a_run_that_appears_while_its_directory_is_claimed_goes_on(
    place: Location, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rival may start, write its config and end between our first look and our claim."""
    claim = Ownership.claim

    def late(self: Ownership) -> None:
        monkeypatch.setattr(Ownership, "claim", claim)
        rival.append(started(place))
        Run(place, rival[0], 1).write_status("failed", RowCounts(), TokenCounts())
        self.claim()

    rival: list[str] = []
    monkeypatch.setattr(Ownership, "claim", late)
    with open_run(place, FINGERPRINT, {}, new_run=False) as run:
        assert (run.run_id, run.attempt) == (rival[0], 2)
    assert yaml.safe_load(Path(place.path, "config.yaml").read_text())["run_id"] == rival[0]


@pytest.mark.parametrize("name", ["notes.txt", "year=1999/a.parquet", "output/a.parquet"])
def test_a_strange_directory_is_refused(place: Location, quick: None, name: str) -> None:
    place.join(name).write_bytes(b"precious")
    with pytest.raises(Refused, match=f"is not empty and not a run directory .*{name}"):
        inspect_run(place, FINGERPRINT, new_run=False)
    with pytest.raises(Refused):
        started(place)
    assert not owner_file(place).exists()


def test_hidden_files_do_not_make_a_directory_strange(place: Location, quick: None) -> None:
    for name in (".DS_Store", "_checkpoint/x", ".git/config"):
        place.join(name).write_bytes(b"")
    started(place)


@pytest.mark.parametrize(
    "text",
    ["name: my project", "", "- 1", "a: [", "run_id: x\nfingerprint: 5", "\x00", "run_id: 5"],
)
def test_the_config_of_another_program_is_refused(place: Location, text: str) -> None:
    place.join("config.yaml").write_bytes(text.encode())
    with pytest.raises(Refused, match=r"config\.yaml: is not the config\.yaml of a run"):
        inspect_run(place, FINGERPRINT, new_run=False)
    place.join("config.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(Refused):
        inspect_run(place, FINGERPRINT, new_run=False)


def test_other_settings_are_refused_by_name(place: Location, quick: None) -> None:
    started(place)
    other = {
        "task": "summarize",
        "options": {"num_beams": 4},
        "input": {"a.parquet": {"rows": 3}, "c.parquet": {"rows": 1}},
    }
    for attempt in (inspect_run, lambda *a, **k: open_run(*a[:2], {}, **k).__enter__()):
        with pytest.raises(Refused) as refused:
            attempt(place, other, new_run=False)
        told = refused.value.problems[0]
        assert "options.num_beams was 2, is 4" in told
        assert "input.a.parquet.rows was 2, is 3" in told
        assert "input.b.parquet is gone" in told
        assert "input.c.parquet is new" in told
        assert "task" not in told
        assert "another --output" in refused.value.problems[1]
    assert not owner_file(place).exists()


def test_files_may_be_skipped_later_but_not_others_added(place: Location, quick: None) -> None:
    started(place)
    fewer = FINGERPRINT | {"input": {"a.parquet": {"rows": 2}}}
    with pytest.raises(Refused, match=r"b\.parquet is gone"):
        inspect_run(place, fewer, new_run=False)
    assert inspect_run(place, fewer, new_run=False, skipped=["b.parquet"]).run_id
    with open_run(place, fewer, {}, new_run=False, skipped=["b.parquet"]) as run:
        assert run.attempt == 1
    with pytest.raises(Refused, match=r"a\.parquet"):
        inspect_run(place, FINGERPRINT, new_run=False, skipped=["a.parquet"])


def test_a_new_run_refuses_rows_of_any_run(place: Location, quick: None) -> None:
    started(place)
    assert inspect_run(place, FINGERPRINT, new_run=True)
    place.join("output", "x-0.parquet").write_bytes(b"rows")
    assert inspect_run(place, FINGERPRINT, new_run=False)
    with pytest.raises(Refused, match="--new-run, but this directory holds rows"):
        inspect_run(place, FINGERPRINT, new_run=True)


@pytest.mark.parametrize("below_a_file", [True, False])
def test_a_place_that_cannot_be_written(tmp_path: Path, below_a_file: bool) -> None:
    if below_a_file:
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "run"
    else:
        path = Path("/proc/run")  # even root makes no directories there
    with pytest.raises(Refused, match=rf"{path}: cannot be used"):
        started(locate(str(path)))


# --- differences in words ---


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({}, {}, []),
        ({"a": 1}, {"a": 1.0}, []),
        ({"a": 1}, {"a": 2}, ["a was 1, is 2"]),
        ({"a": None}, {"a": False}, ["a was None, is False"]),
        ({"a": {"b": {"c": "x"}}}, {"a": {"b": {"c": "y"}}}, ["a.b.c was 'x', is 'y'"]),
        ({"a": {}}, {"a": 3}, ["a was {}, is 3"]),
        ({"a": [1, 2]}, {"a": [2, 1]}, ["a was [1, 2], is [2, 1]"]),
        ({"b": 1}, {"a": 1}, ["a is new", "b is gone"]),
    ],
)
def test_differences(old: Any, new: Any, told: list[str]) -> None:
    assert differences(old, new) == told


# --- what counts as written ---


def test_only_committed_files_count(place: Location) -> None:
    run = Run(place, "abc", 1)
    for name in ("b_000-0", "b_000-1", "a_111-0", "c_222-0", "stray"):
        run.output.join(f"{name}.parquet").write_bytes(b"")
    for name in ("b_000", "a_111", "c_222.pending", "never_written"):
        run.checkpoint.join(f"{name}.parquet").write_bytes(b"")
    assert [Path(f.path).name for f in run.committed_files()] == [
        "a_111-0.parquet",
        "b_000-0.parquet",
        "b_000-1.parquet",
    ]
    run.clear_pending()
    assert sorted(p.name for p in Path(run.output.path).iterdir()) == [
        "a_111-0.parquet",
        "b_000-0.parquet",
        "b_000-1.parquet",
        "stray.parquet",
    ]
    assert len(list(Path(run.checkpoint.path).iterdir())) == 3
    run.clear_pending()
    assert len(run.committed_files()) == 3


def test_an_empty_run_has_no_files(place: Location) -> None:
    run = Run(place, "abc", 1)
    assert run.committed_files() == []
    run.clear_pending()
    assert not Path(place.path).exists()
