"""A model is found by path, hub id or URL; only named protocols are followed."""

import importlib
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from longformer_core.errors import CheckpointError
from longformer_core.hub import resolve


class FakeS3(MemoryFileSystem):
    """A bucket in memory that answers to s3:// and counts what is fetched."""

    protocol = "s3"
    store: dict[str, Any] = {}  # noqa: RUF012  the base class shares it too
    pseudo_dirs = [""]  # noqa: RUF012
    fetched: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        self.fetched.append(rpath)
        super().get_file(rpath, lpath, **kwargs)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(registry._registry, "s3", FakeS3)
    store = FakeS3(skip_instance_cache=True)
    store.store.clear()
    store.fetched.clear()
    return store


def test_local_directories_are_taken_as_they_are(tmp_path: Path) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == resolve(f"file://{tmp_path}") == tmp_path


@pytest.mark.parametrize(
    "url",
    [
        "http://host/model",
        "https://host/model",
        "ftp://host/model",
        "github://owner:repo@main/model",
        "memory://model",
        "simplecache::s3://bucket/model",
        "s3://bucket/model::file:///etc",
        "filecache::file:///etc",
        "S3://bucket/model",
    ],
)
def test_other_protocols_and_chains_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not an allowed address"):
        resolve(url, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_remote_directory_is_copied_once_per_content(bucket: FakeS3, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "merges.txt", "run.py"):
        bucket.pipe_file(f"s3://b/led/{name}", name.encode())
    bucket.pipe_file("s3://b/led/checkpoint-1/model.safetensors", b"no")
    first = resolve("s3://b/led", cache_dir=tmp_path)
    names = ["config.json", "merges.txt", "model.safetensors"]
    assert sorted(p.name for p in first.iterdir()) == names
    assert (first / "config.json").read_bytes() == b"config.json"
    assert resolve("s3://b/led/", cache_dir=tmp_path) == first
    assert len(bucket.fetched) == 3
    bucket.pipe_file("s3://b/led/config.json", b"other")
    second = resolve("s3://b/led", cache_dir=tmp_path)
    assert (second / "config.json").read_bytes() == b"other"
    assert (first / "config.json").read_bytes() == b"config.json"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([first.name, second.name])


def test_an_interrupted_copy_leaves_nothing_that_looks_whole(
    bucket: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe_file("s3://b/led/config.json", b"{}")
    bucket.pipe_file("s3://b/led/model.safetensors", b"x")
    fetch = FakeS3.get_file

    def fail_on_weights(self: FakeS3, rpath: str, lpath: str, **kwargs: Any) -> None:
        if rpath.endswith(".safetensors"):
            raise OSError("connection lost")
        fetch(self, rpath, lpath, **kwargs)

    monkeypatch.setattr(FakeS3, "get_file", fail_on_weights)
    with pytest.raises(CheckpointError, match="connection lost"):
        resolve("s3://b/led", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_not_there_is_named(bucket: FakeS3, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    bucket.pipe_file("s3://b/empty/readme", b"x")
    for name, message in (
        (str(tmp_path / "absent"), "neither a directory here nor a hub id"),
        (str(tmp_path / "file"), "is a file"),
        (f"file://{tmp_path}/absent", "not a directory"),
        ("s3://b/absent", "cannot be read"),
        ("s3://b/empty", "no model files"),
        ("../a/b", "neither a directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resolve(name, cache_dir=tmp_path / "cache")


def test_hub_ids_come_from_the_cache_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(CheckpointError, match="some-owner/led"):
        resolve("some-owner/led")
    commit = "0" * 40
    snapshot = tmp_path / "models--some-owner--led" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"x")
    refs = tmp_path / "models--some-owner--led" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve("some-owner/led") == snapshot
    with pytest.raises(CheckpointError, match="at revision 'v2'"):
        resolve("some-owner/led", revision="v2")
    (refs / "v2").write_text("1" * 40)
    other = snapshot.with_name("1" * 40)
    other.mkdir()
    (other / "tf_model.h5").write_bytes(b"x")
    assert resolve("some-owner/led", revision="v2") == other
    assert resolve("some-owner/led", revision=commit) == snapshot


def test_only_hub_ids_have_revisions(tmp_path: Path) -> None:
    for name in (tmp_path, f"file://{tmp_path}", "s3://b/led"):
        with pytest.raises(CheckpointError, match="only hub ids have revisions"):
            resolve(name, revision="main")


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5"], "model.safetensors"),
        (["pytorch_model.bin", "tf_model.h5"], "pytorch_model.bin"),
        (["tf_model.h5", "last.ckpt"], "tf_model.h5"),
        (["last.ckpt"], "last.ckpt"),
    ],
)
def test_one_kind_of_weights_is_fetched(
    bucket: FakeS3, tmp_path: Path, there: list[str], fetched: str
) -> None:
    for name in there:
        bucket.pipe_file(f"s3://b/led/{name}", b"x")
    (file,) = resolve("s3://b/led", cache_dir=tmp_path).iterdir()
    assert file.name == fetched
