"""The JSON files of a run directory, as strict models."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

State = Literal["validating", "running", "finalizing", "completed", "failed", "cancelled"]


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RowCounts(StrictModel):
    """`in` is a Python keyword, hence the alias."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    rows_in: int = Field(0, alias="in")
    ok: int = 0
    failed: int = 0


class ManifestRows(RowCounts):
    truncated: int = 0


class TokenCounts(StrictModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    tokens_in: int = Field(0, alias="in")
    out: int = 0


class Status(StrictModel):
    """status.json."""

    status: State
    run_id: str
    attempt: int
    rows: RowCounts = RowCounts()
    tokens: TokenCounts = TokenCounts()
    started: float
    updated: float
    message: str = ""


class InputEntry(StrictModel):
    path: str
    rows: int
    bytes: int


class SkippedEntry(StrictModel):
    path: str
    reason: str


class FileEntry(StrictModel):
    path: str
    rows: int
    bytes: int
    xxh64: str


class Manifest(StrictModel):
    """_manifest.json: readers take the files listed here, once `_SUCCESS` stands beside it."""

    schema_version: Literal[1] = 1
    run_id: str
    status: State
    fingerprint: dict[str, Any]
    rows: ManifestRows
    errors: dict[str, int]
    tokens: TokenCounts
    timings: dict[str, float]
    versions: dict[str, str]
    input: list[InputEntry]
    skipped: list[SkippedEntry]
    files: list[FileEntry]
