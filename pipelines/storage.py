"""Paths and file systems: the one place that turns what a user typed into a pyarrow file system.

Everything a pipeline reads or writes goes through `Location`, so a local directory and a bucket
take the same road.
"""

import json
import os
import posixpath
import shutil
import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from pipelines.errors import Refused

SCHEMES = ("file", "s3", "gs", "gcs", "az", "abfs", "abfss")


@dataclass(frozen=True)
class Location:
    """A path on a file system. `str()` gives it back as a user would type it."""

    filesystem: pafs.FileSystem
    path: str
    scheme: str  # "" for a local path

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}" if self.scheme else self.path

    @property
    def is_local(self) -> bool:
        return not self.scheme

    def join(self, *names: str) -> "Location":
        return Location(self.filesystem, posixpath.join(self.path, *names), self.scheme)

    def info(self) -> pafs.FileInfo:
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        return bool(self.info().type != pafs.FileType.NotFound)

    def read_bytes(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write_bytes(self, data: bytes) -> None:
        """Write the whole file so that a reader sees the old content or the new, never a part.

        Object stores put whole objects; a local file is written beside and renamed over.
        """
        target = self.path
        if self.is_local:
            directory, name = posixpath.split(self.path)
            os.makedirs(directory, exist_ok=True)
            target = posixpath.join(directory, f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            with self.filesystem.open_output_stream(target) as stream:
                stream.write(data)
            if target != self.path:
                os.replace(target, self.path)
        except OSError:
            if target != self.path and os.path.exists(target):
                os.unlink(target)
            raise

    def read_json(self) -> Any:
        return json.loads(self.read_bytes())

    def write_json(self, value: Any) -> None:
        self.write_bytes(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def make_directory(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def files(self, *, recursive: bool = False) -> list[pafs.FileInfo]:
        """The files below this directory, sorted by path; empty if there is no such directory."""
        selector = pafs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return sorted((i for i in found if i.type == pafs.FileType.File), key=lambda i: i.path)


def locate(path: str) -> Location:
    """Resolve a local path or a s3://, gs://, az:// URL.

    Raises: Refused for chained URLs and for any other scheme: a job reads no address that a row or
    an option smuggles in.
    """
    if "::" in path:
        raise Refused(
            f"{path}: chained URLs are not read; give a plain path or s3://, gs://, az://"
        )
    if not path.strip():
        raise Refused("an empty path; give a file or a directory")
    scheme = path.partition("://")[0].lower() if "://" in path else ""
    if scheme and scheme not in SCHEMES:
        raise Refused(
            f"{path}: scheme {scheme}:// is not supported; use a local path, s3://, gs:// or az://"
        )
    if scheme in ("", "file"):
        local = path.partition("://")[2] if scheme else path
        return Location(pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(local)), "")
    try:
        filesystem, inner = _remote(path, scheme)
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: cannot open this file system: {error}") from error
    return Location(filesystem, inner.rstrip("/"), scheme)


def _remote(path: str, scheme: str) -> tuple[pafs.FileSystem, str]:
    # Wildcards are no legal URI characters, so the file system is taken from the part before them.
    inner = path.split("://", 1)[1]
    if scheme == "az":
        account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
        if not account:
            raise ValueError("az:// needs the environment variable AZURE_STORAGE_ACCOUNT_NAME")
        return pafs.AzureFileSystem(account_name=account), inner
    bucket = inner.split("/", 1)[0]
    filesystem, bucket_path = pafs.FileSystem.from_uri(f"{scheme}://{bucket}")
    return filesystem, posixpath.join(bucket_path, *inner.split("/", 1)[1:])


def has_wildcard(path: str) -> bool:
    return any(c in path for c in "*?[")


def common_directory(paths: list[str]) -> str:
    """The deepest directory that holds all of these directories; "" if they share none."""
    return posixpath.commonpath(paths) if paths else ""


def check_room(location: Location, num_bytes: int) -> list[str]:
    """Is there room for the output on a local disk?"""
    if not location.is_local:
        return []
    path = location.path
    while not os.path.exists(path):
        path = os.path.dirname(path)
    free = shutil.disk_usage(path).free
    if free >= num_bytes:
        return []
    return [f"{location}: {free:,} bytes free, the output may need {num_bytes:,}"]
