"""Paths and file systems: what a user types, and files that are written whole or not at all."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from pipelines.errors import Refused
from pipelines.storage import Location, common_directory, has_wildcard, locate


def test_local_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for typed, path in {
        "a/b": tmp_path / "a/b",
        "./a/../b/": tmp_path / "b",
        f"file://{tmp_path}/a": tmp_path / "a",
        f"FILE://{tmp_path}/a": tmp_path / "a",
        "~/runs": tmp_path / "home/runs",
        "a run #1 100%": tmp_path / "a run #1 100%",
    }.items():
        location = locate(typed)
        assert location.path == str(location) == str(path)
        assert location.is_local


@pytest.mark.parametrize("typed", ["s3://bucket/a/b/", "S3://bucket/a/b"])
def test_a_bucket(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    location = locate(typed)
    assert (location.path, location.scheme) == ("bucket/a/b", "s3")
    assert str(location) == "s3://bucket/a/b"
    assert str(location.join("output", "x.parquet")) == "s3://bucket/a/b/output/x.parquet"
    assert not location.is_local


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "hdfs", "memory", "github", "HTTPS"])
def test_other_schemes_are_refused(scheme: str) -> None:
    with pytest.raises(Refused, match=r"scheme .*:// is not supported; use a local path, s3://"):
        locate(f"{scheme}://host/path")


@pytest.mark.parametrize(
    "typed", ["simplecache::s3://b/a", "zip://a::http://b/c.zip", "s3://b/a::file://c", "a::b"]
)
def test_chained_addresses_are_refused(typed: str) -> None:
    with pytest.raises(Refused, match="chained"):
        locate(typed)


@pytest.mark.parametrize("typed", ["", "  "])
def test_an_empty_path_is_not_the_current_directory(typed: str) -> None:
    with pytest.raises(Refused, match="empty path"):
        locate(typed)


def test_strange_addresses_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(Refused, match="AZURE_STORAGE_ACCOUNT_NAME"):
        locate("az://container/path")
    with pytest.raises(Refused, match="http"):
        locate("http://[::")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = locate(str(tmp_path / "deep" / "er" / "status.json"))
    assert not file.exists()
    file.write_json({"rows": 1, "text": "é"})
    assert file.read_json() == {"rows": 1, "text": "é"}
    assert json.loads(Path(file.path).read_text(encoding="utf-8"))["text"] == "é"
    file.write_json({"rows": 2})
    assert file.read_json() == {"rows": 2}
    assert [p.name for p in Path(file.path).parent.iterdir()] == ["status.json"]


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    class Full(pafs.FileSystemHandler):  # type: ignore[misc]
        """Takes the first bytes and then has no room."""

        def __getattribute__(self, name: str) -> object:
            return object.__getattribute__(self, name)

        def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    for name in Full.__abstractmethods__:
        setattr(Full, name, lambda *_: None)
    Full.__abstractmethods__ = frozenset()
    target = tmp_path / "status.json"
    target.write_bytes(b"old")
    full = Location(pafs.PyFileSystem(Full()), str(target), "")
    with pytest.raises(OSError, match="No space"):
        full.write_bytes(b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_files_of_a_directory(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        locate(str(tmp_path / name)).write_bytes(b"")
    here = locate(str(tmp_path))
    assert [i.path for i in here.files()] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert len(here.files(recursive=True)) == 3
    assert here.join("nowhere").files() == []


def test_wildcards_and_common_directories() -> None:
    assert all(map(has_wildcard, ("a*", "a?", "[a]")))
    assert not has_wildcard("a/b c#{1}")
    assert common_directory(["/a/b", "/a/c/d", "/a/c"]) == "/a"
    assert common_directory(["/a/bc", "/a/bd"]) == "/a"
    assert common_directory([]) == ""
