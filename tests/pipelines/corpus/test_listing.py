"""Listing of Parquet corpora: every problem of every file, at once."""

import decimal
import os
import uuid
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from pipelines.corpus.listing import TEXT, Corpus, read_ids
from tests.pipelines.parquet import (
    destroy_page,
    invalid_utf8,
    listed,
    problems_of,
    read,
    texts,
    write,
)


def names(corpus: Corpus) -> list[str]:
    return [f.name for f in corpus.files]


# --- which files ---


def test_a_directory_means_its_parquet_files_at_any_depth(tmp_path: Path) -> None:
    for name in ("b.parquet", "a/c.parquet", "a/deep/d.parquet", "part=1/e.parquet"):
        write(tmp_path / name, texts(1))
    for name in ("_x.parquet", ".y.parquet", "_tmp/z.parquet", "a/.hidden/z.parquet"):
        write(tmp_path / name, texts(1))
    (tmp_path / "README.md").write_text("not data")
    corpus = listed(tmp_path)
    expected = ["a/c.parquet", "a/deep/d.parquet", "b.parquet", "part=1/e.parquet"]
    assert names(corpus) == expected
    assert read(corpus)["id"].to_pylist() == [f"{name}#0" for name in expected]
    assert listed(f"{tmp_path}/") == corpus
    assert listed(f"file://{tmp_path}") == corpus


def test_a_directory_that_itself_lies_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    write(tmp_path / "_exports" / "a.parquet", texts(2))
    assert names(listed(tmp_path / "_exports")) == ["a.parquet"]
    assert names(listed(f"{tmp_path}/_exports/*.parquet")) == ["a.parquet"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.parquet", ["b.parquet"]),
        ("a/*.parquet", ["c.parquet"]),
        ("*/c.parquet", ["a/c.parquet"]),
        ("**/*.parquet", ["a/c.parquet", "a/deep/d.parquet", "b.parquet"]),
        ("a/**", ["c.parquet", "deep/d.parquet"]),
        ("a/dee?", ["deep/d.parquet"]),
        ("[ab]*", ["a/c.parquet", "a/deep/d.parquet", "b.parquet"]),
        ("_tmp/*.parquet", ["z.parquet"]),
        ("*/_private.parquet", ["a/_private.parquet"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("b.parquet", "a/c.parquet", "a/deep/d.parquet", "_tmp/z.parquet"):
        write(tmp_path / name, texts(1))
    write(tmp_path / "a/_private.parquet", texts(1))
    assert names(listed(f"{tmp_path}/{pattern}")) == expected


def test_a_name_with_wildcard_characters_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "part[1].parquet", texts(1))
    write(tmp_path / "part1.parquet", texts(1))
    assert names(listed(tmp_path / "part[1].parquet")) == ["part[1].parquet"]


def test_names_are_relative_to_the_common_root(tmp_path: Path) -> None:
    for name in ("x/1/a.parquet", "x/2/a.parquet", "x/2/b.parquet"):
        write(tmp_path / name, texts(1))
    assert names(listed([tmp_path / "x/1", tmp_path / "x/2"])) == [
        "1/a.parquet",
        "2/a.parquet",
        "2/b.parquet",
    ]
    assert names(listed(tmp_path / "x/1/a.parquet")) == ["a.parquet"]
    # A file named twice, by itself and by its directory, is read once.
    twice = listed([tmp_path / "x/2", tmp_path / "x/2/a.parquet", f"{tmp_path}/x/2/*"])
    assert names(twice) == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org/a.parquet",
        "https://example.org/a.parquet",
        "HTTP://example.org/a.parquet",
        "ftp://example.org/a.parquet",
        "simplecache::s3://bucket/a.parquet",
        "filecache::http://example.org/a",
    ],
)
def test_addresses_that_are_not_followed(tmp_path: Path, address: str) -> None:
    write(tmp_path / "a.parquet", texts(1))
    told = problems_of([tmp_path / "a.parquet", address, tmp_path / "nowhere.parquet"])
    assert address in told
    # One refused path does not hide the next one's problem.
    assert "nowhere.parquet" in told


def test_no_files_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    told = problems_of([tmp_path / "empty", tmp_path / "missing", f"{tmp_path}/*.parquet"])
    assert f"{tmp_path}/empty: matches no Parquet, JSON Lines or CSV file" in told
    assert f"{tmp_path}/missing: cannot be listed: there is no such file" in told
    assert f"{tmp_path}/*.parquet: matches no Parquet, JSON Lines or CSV file" in told
    assert "empty path" in problems_of("")


def test_no_rows_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
    assert "holds no rows" in problems_of(tmp_path)


# --- what is wrong with them ---


def bad_files(folder: Path) -> None:
    write(folder / "good.parquet", texts(3))
    (folder / "zero.parquet").touch()
    whole = write(folder / "cut.parquet", texts(100)).read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "foreign.parquet").write_text('{"text": "json lines"}\n' * 50)
    (folder / "footer.parquet").write_bytes(whole[:-40] + b"\xff" * 32 + whole[-8:])


def test_every_bad_file_is_named_at_once(tmp_path: Path) -> None:
    bad_files(tmp_path)
    write(tmp_path / "other.parquet", {"body": ["no text here"]})
    write(tmp_path / "number.parquet", {"text": [1, 2]})
    told = problems_of(tmp_path)
    for name in ("cut", "foreign", "footer"):
        assert f"{name}.parquet: is not a readable Parquet file" in told
    assert "zero.parquet: is empty (0 bytes)" in told
    assert "other.parquet: no column 'text'; it has 'body'" in told
    assert "number.parquet: text column 'text' is int64, not a string" in told
    assert "good.parquet" not in told
    assert "--skip-bad-files" in told


def test_bad_files_are_skipped_when_asked(tmp_path: Path) -> None:
    bad_files(tmp_path)
    corpus = listed(tmp_path, skip_bad_files=True)
    assert names(corpus) == ["good.parquet"]
    assert set(corpus.skipped) == {f"{n}.parquet" for n in ("zero", "cut", "foreign", "footer")}
    assert all(corpus.skipped.values())
    assert read(corpus).num_rows == 3


def test_skipping_does_not_excuse_a_wrong_column(tmp_path: Path) -> None:
    bad_files(tmp_path)
    write(tmp_path / "number.parquet", {"text": [1]})
    told = problems_of(tmp_path, skip_bad_files=True)
    assert "number.parquet" in told
    assert "zero.parquet" not in told


def test_nothing_left_after_skipping(tmp_path: Path) -> None:
    (tmp_path / "zero.parquet").touch()
    assert "no readable file" in problems_of(tmp_path, skip_bad_files=True)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    write(tmp_path / "a.parquet", table)
    assert "a.parquet: more than one column is called 'text'" in problems_of(tmp_path)


# --- ids ---


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.int64(),
        pa.uint16(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_ids_of_every_type_are_strings(tmp_path: Path, kind: pa.DataType) -> None:
    numbers = pa.array([3, 1, 2])
    ids = numbers.cast(kind) if pa.types.is_integer(kind) else numbers.cast(pa.string()).cast(kind)
    write(tmp_path / "a.parquet", {"key": ids, **texts(3)}, groups=[2, 1])
    corpus = listed(tmp_path, id_column="key")
    assert read(corpus)["id"].to_pylist() == ["3", "1", "2"]
    assert read_ids(corpus, corpus.files[0]).to_pylist() == ["3", "1", "2"]


def test_a_column_called_id_is_the_id(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"id": ["x", "y"], **texts(2)})
    assert listed(tmp_path).id_column == "id"
    write(tmp_path / "b.parquet", {"key": ["p"], **texts(1)})
    told = problems_of(tmp_path)
    assert "column 'id' is in some files but missing in 'b.parquet'" in told
    assert "--id-column" in told


def test_null_and_repeated_ids_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"id": ["x", None, "y", None], **texts(4)})
    write(tmp_path / "b.parquet", {"id": ["z", "y", "z"], **texts(3)})
    told = problems_of(tmp_path)
    assert "a.parquet: 2 null ids, first in rows [1, 3]" in told
    assert "2 ids stand for more than one row" in told
    assert "'y'" in told
    assert "'z'" in told


def test_a_number_and_its_word_are_the_same_id(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"id": [1, 2], **texts(2)})
    write(tmp_path / "b.parquet", {"id": ["2", "3"], **texts(2)})
    assert "1 ids stand for more than one row, for example '2'" in problems_of(tmp_path)


def test_ids_beyond_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"id": ["x", "y", "x", None], **texts(4)})
    assert read(listed(tmp_path, limit=2))["id"].to_pylist() == ["x", "y"]
    assert "null ids" in problems_of(tmp_path)


@pytest.mark.parametrize(
    "kind", [pa.float64(), pa.bool_(), pa.decimal128(9, 2), pa.timestamp("us"), pa.binary()]
)
def test_other_types_are_no_ids(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path / "a.parquet", {"id": pa.array([None], kind), **texts(1)})
    assert f"id column 'id' is {kind}; ids are strings, integers" in problems_of(tmp_path)


def test_ids_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"id": invalid_utf8([b"fine", b"\xff\xfe"]), **texts(2)})
    assert "a.parquet: id column cannot be read: Invalid UTF8" in problems_of(tmp_path)


def test_uuids_and_whole_decimals_are_ids(tmp_path: Path) -> None:
    keys = [uuid.UUID(int=7), uuid.UUID(int=2**127)]
    bare = pa.array([k.bytes for k in keys], pa.binary(16))
    numbers = [decimal.Decimal(10**37), decimal.Decimal(-5)]
    kinds = {
        "uuid": (pa.array([k.bytes for k in keys], pa.uuid()), [str(k) for k in keys]),
        "bare": (bare, [str(k) for k in keys]),
        "decimal": (pa.array(numbers, pa.decimal128(38, 0)), [str(10**37), "-5"]),
    }
    for name, (ids, expected) in kinds.items():
        write(tmp_path / name / "a.parquet", {"id": ids, **texts(2)})
        assert read(listed(tmp_path / name))["id"].to_pylist() == expected


def test_ids_are_made_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"id": ["x", "x"], **texts(2)})
    write(tmp_path / "b.parquet", {"id": [0.5], **texts(1)})
    assert "--id-column file#row makes ids" in problems_of(tmp_path / "a.parquet")
    assert "--id-column file#row makes ids" in problems_of(tmp_path / "b.parquet")
    corpus = listed(tmp_path, id_column="file#row")
    assert read(corpus)["id"].to_pylist() == ["a.parquet#0", "a.parquet#1", "b.parquet#0"]
    assert corpus.column_fingerprint()["id"] == "file#row"


# --- files without a text ---


def test_files_whose_text_is_null_have_null_texts(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"id": ["a"], "year": ["1999"], **texts(1)})
    frames = {"none": None, "nan": float("nan")}
    for name, value in frames.items():
        frame = pd.DataFrame({"id": [name], "text": [value], "year": [float("nan")]})
        frame.to_parquet(tmp_path / f"{name}.parquet")
    table = read(listed(tmp_path, kept={"year": "year"}))
    assert table["id"].to_pylist() == ["a", "nan", "none"]
    assert table[TEXT].to_pylist() == ["text 0", None, None]
    assert table["year"].to_pylist() == ["1999", None, None]
    pd.DataFrame({"id": ["x", "y"], "text": [0.5, None]}).to_parquet(tmp_path / "z.parquet")
    assert "z.parquet: text column 'text' is double, not a string" in problems_of(tmp_path)


def test_files_without_rows_need_no_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"id": ["a"], **texts(1), "n": [1]})
    pd.DataFrame().to_parquet(tmp_path / "nothing.parquet")
    write(tmp_path / "other.parquet", {"text": pa.array([], pa.int8())})
    corpus = listed(tmp_path, kept={"n": "n"})
    assert list(corpus.listing()) == ["a.parquet", "nothing.parquet", "other.parquet"]
    assert read(corpus)["id"].to_pylist() == ["a"]


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 647693783\n"
    (tmp_path / "a.parquet").write_text(pointer)
    assert "it is a Git LFS pointer, not the data: run `git lfs pull`" in problems_of(tmp_path)


# --- kept columns ---


def test_kept_columns_are_unified_and_renamed(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**texts(2), "year": pa.array([1, 2], pa.int8()), "n": [1, 2]})
    nothing = {**texts(1), "year": pa.array([2**40]), "n": pa.nulls(1)}
    write(tmp_path / "b.parquet", nothing)
    corpus = listed(tmp_path, kept={"year": "published", "n": "n"})
    assert corpus.kept_schema == pa.schema([("published", pa.int64()), ("n", pa.int64())])
    table = read(corpus)
    assert table["published"].to_pylist() == [1, 2, 2**40]
    assert table["n"].to_pylist() == [1, 2, None]


def test_kept_columns_without_a_common_type_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**texts(1), "year": [1999]})
    write(tmp_path / "b.parquet", {**texts(1), "year": ["1999"]})
    told = problems_of(tmp_path, kept={"year": "year", "nothing": "nothing"})
    assert "kept column 'year' has no common type" in told
    assert "int64 in a.parquet" in told
    assert "string in b.parquet" in told
    assert "a.parquet: no column 'nothing'" in told


def test_kept_columns_may_not_take_reserved_names(tmp_path: Path) -> None:
    columns = {**texts(2), "summary": ["s", "t"], "path": ["p", "q"], "__text": ["u", "v"]}
    write(tmp_path / "a.parquet", columns)
    told = problems_of(tmp_path, kept={"summary": "summary", "__text": "__text"})
    assert "kept column 'summary' would overwrite the output column 'summary'" in told
    assert "--keep-as summary=" in told
    assert "'__text'" in told
    told = problems_of(tmp_path, kept={"path": "both", "summary": "both"})
    assert "two kept columns would both be called 'both'" in told
    corpus = listed(tmp_path, kept={"summary": "theirs", "path": "path", "text": "source"})
    table = read(corpus)
    assert table["theirs"].to_pylist() == ["s", "t"]
    assert table["path"].to_pylist() == ["p", "q"]
    assert table["source"].to_pylist() == table[TEXT].to_pylist() == texts(2)["text"]


def test_folders_named_key_value_add_no_columns(tmp_path: Path) -> None:
    for name in ("year=1999/text=hello/a.parquet", "year=2000/text=hello/a.parquet"):
        write(tmp_path / name, {**texts(1), "year": ["mine"]})
    table = read(listed(tmp_path, kept={"year": "year"}))
    assert table["year"].to_pylist() == ["mine", "mine"]
    assert table[TEXT].to_pylist() == ["text 0", "text 0"]


# --- pages that do not decode ---


def test_a_bad_id_page_is_found_when_listing(tmp_path: Path) -> None:
    columns = {"id": [f"row {i}" for i in range(20)], **texts(20)}
    destroy_page(write(tmp_path / "bad.parquet", columns, groups=[10, 10]), "id", 1)
    write(tmp_path / "good.parquet", {"id": ["a"], **texts(1)})
    assert "bad.parquet: id column cannot be read" in problems_of(tmp_path)
    corpus = listed(tmp_path, skip_bad_files=True)
    assert names(corpus) == ["good.parquet"]
    assert list(corpus.skipped) == ["bad.parquet"]


# --- files that change ---


def test_the_listing_tells_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", texts(4))
    before = listed(tmp_path).listing()
    assert list(before) == ["a.parquet"]
    assert listed(tmp_path).listing() == before
    assert listed(tmp_path, limit=3).listing() != before
    os.utime(path, ns=(0, 5))
    assert listed(tmp_path).listing() != before
