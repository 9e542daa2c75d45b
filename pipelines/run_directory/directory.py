"""A run directory: who owns it, what it was started with, how far it is.

    config.yaml        what the run was started with: options and fingerprint
    output/            every input row once, good or failed
    dead_letter/       the failed rows again with their input columns, to be run again alone
    metrics/           <attempt>-<n>.jsonl, whole files (object stores cannot append)
    status.json        the state, for anybody who looks
    _owner.json        the one process that may write here
    _checkpoint/       Ray Data's row-id checkpoint
    _manifest.json     the list of files that make the result
    _SUCCESS           last; before it nothing here is a result

Readers wait for `_SUCCESS`, then take the files that the manifest lists.
"""

import contextlib
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipelines.errors import Refused
from pipelines.run_directory.ownership import Ownership
from pipelines.run_directory.schemas import (
    Manifest,
    RowCounts,
    State,
    Status,
    StrictModel,
    TokenCounts,
)
from pipelines.storage import Location


class Run:
    """A run directory that this process has opened."""

    def __init__(self, location: Location, run_id: str, attempt: int) -> None:
        self.location = location
        self.run_id, self.attempt = run_id, attempt
        self.ownership = Ownership(location)
        self._started = time.time()
        self._num_metrics = 0

    @property
    def output(self) -> Location:
        return self.location.join("output")

    @property
    def dead_letter(self) -> Location:
        return self.location.join("dead_letter")

    @property
    def checkpoint(self) -> Location:
        return self.location.join("_checkpoint")

    def write_status(
        self, state: State, rows: RowCounts, tokens: TokenCounts, message: str = ""
    ) -> None:
        status = Status(
            status=state,
            run_id=self.run_id,
            attempt=self.attempt,
            rows=rows,
            tokens=tokens,
            started=self._started,
            updated=time.time(),
            message=message,
        )
        self.location.join("status.json").write_json(status.model_dump(by_alias=True))

    def write_config(self, options: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        config = {"run_id": self.run_id, "options": options, "fingerprint": fingerprint}
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self.location.join("config.yaml").write_bytes(text.encode())

    def write_metrics(self, lines: list[str]) -> None:
        """One more whole file of metrics; nothing for no lines."""
        if lines:
            name = f"{self.attempt}-{self._num_metrics}.jsonl"
            self.location.join("metrics", name).write_bytes("".join(lines).encode())
            self._num_metrics += 1

    def write_manifest(self, manifest: Manifest) -> None:
        self.location.join("_manifest.json").write_json(manifest.model_dump(by_alias=True))

    def mark_success(self) -> None:
        self.location.join("_SUCCESS").write_bytes(b"")

    def committed_files(self) -> list[Location]:
        """Output files whose rows Ray's checkpoint has committed, sorted by name.

        A data file is `<base>-<i>.parquet`, its checkpoint `<base>.parquet`; while the commit is
        pending the checkpoint is `<base>.pending.parquet` and the data file does not count.
        """
        committed = {
            Path(i.path).name.removesuffix(".parquet")
            for i in self.checkpoint.files()
            if not i.path.endswith(".pending.parquet")
        }
        return [
            self.output.join(Path(i.path).name)
            for i in self.output.files()
            if Path(i.path).stem.rpartition("-")[0] in committed
        ]

    def clear_pending(self) -> None:
        """Remove what a killed attempt left half written, data first, its checkpoint after.

        Ray does the same when it resumes; a run with nothing left to do does not start Ray.
        """
        filesystem = self.location.filesystem
        pending = [i.path for i in self.checkpoint.files() if i.path.endswith(".pending.parquet")]
        for path in pending:
            base = Path(path).name.removesuffix(".pending.parquet")
            for info in self.output.files():
                if Path(info.path).stem.rpartition("-")[0] == base:
                    filesystem.delete_file(info.path)
            filesystem.delete_file(path)


@contextlib.contextmanager
def open_run(
    location: Location,
    fingerprint: dict[str, Any],
    options: dict[str, Any],
    *,
    new_run: bool,
    skipped: Collection[str] = (),
) -> Iterator[Run]:
    """Own a run directory for the length of the block: a new one, or this very run's.

    Raises: Refused if the directory belongs to another run, to another owner, or cannot be
    written.
    """
    found = inspect_run(location, fingerprint, new_run=new_run, skipped=skipped)
    run = Run(location, found.run_id or uuid.uuid4().hex, found.attempt + 1)
    try:
        with _usable(location):
            location.make_directory()
            run.ownership.claim()
            # The directory may have changed hands between the look above and the claim.
            found = inspect_run(location, fingerprint, new_run=new_run, skipped=skipped)
            run.run_id, run.attempt = found.run_id or run.run_id, found.attempt + 1
            run.output.make_directory()
            if found.run_id is None:
                run.write_config(options, fingerprint)
        yield run
    finally:
        with contextlib.suppress(OSError):
            run.ownership.release()


@contextlib.contextmanager
def _usable(location: Location) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(f"{location}: cannot be used as an output directory: {error}") from error


class FoundRun(StrictModel):
    """What a directory holds before it is opened."""

    run_id: str | None = None
    attempt: int = 0
    completed: bool = False


def inspect_run(
    location: Location,
    fingerprint: dict[str, Any],
    *,
    new_run: bool,
    skipped: Collection[str] = (),
) -> FoundRun:
    """Look at a directory without touching it.

    `skipped` are input files left out as unreadable: a run may go on without them.
    Raises: Refused if it is not empty and not a run with this fingerprint, or if `new_run` is
    asked of a directory that holds rows.
    """
    with _usable(location):
        config_file = location.join("config.yaml")
        if not config_file.exists():
            inside = (
                i.path[len(location.path) :].strip("/") for i in location.files(recursive=True)
            )
            stranger = next((name for name in inside if not name.startswith((".", "_"))), None)
            if stranger is not None:
                raise Refused(
                    f"{location}: is not empty and not a run directory (it holds {stranger}); "
                    "choose a new --output"
                )
            return FoundRun()
        run_id, before = _read_config(config_file)
        completed = location.join("_SUCCESS").exists()
        if new_run and location.join("output").files():
            raise Refused(
                f"{location}: --new-run, but this directory holds rows; choose a new --output"
            )
        left_out = set(skipped)
        before["input"] = {k: v for k, v in before["input"].items() if k not in left_out}
        changed = differences(before, fingerprint)
        if changed:
            raise Refused(
                [
                    f"{location}: was started with other settings: {'; '.join(changed)}",
                    "give the same settings to go on with it, or another --output for a new run",
                ]
            )
        return FoundRun(run_id=run_id, attempt=last_attempt(location), completed=completed)


def _read_config(file: Location) -> tuple[str, dict[str, Any]]:
    """Run id and fingerprint. Many programs write a config.yaml: another's is Refused."""
    try:
        config = yaml.safe_load(file.read_bytes())
        run_id, fingerprint = config["run_id"], config["fingerprint"]
        if isinstance(run_id, str) and isinstance(fingerprint["input"], dict):
            return run_id, fingerprint
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        pass
    raise Refused(f"{file}: is not the config.yaml of a run; choose a new --output")


def last_attempt(location: Location) -> int:
    try:
        return int(Status.model_validate(location.join("status.json").read_json()).attempt)
    except (FileNotFoundError, ValidationError, ValueError):
        return 0


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What changed between two fingerprints, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys(), key=str):
            inner = f"{name}.{key}" if name else str(key)
            if key not in new:
                found.append(f"{inner} is gone")
            elif key not in old:
                found.append(f"{inner} is new")
            else:
                found += differences(old[key], new[key], inner)
        return found
    return [] if old == new else [f"{name} was {old!r}, is {new!r}"]


def read_manifest(location: Location) -> Manifest:
    return Manifest.model_validate_json(location.join("_manifest.json").read_bytes())
