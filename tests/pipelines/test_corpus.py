"""Listing and reading of Parquet corpora: every file, every row, or the reason why not."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import corpus as corpus_module
from pipelines.corpus import (
    READ_ERROR,
    TEXT,
    Corpus,
    ParquetCorpus,
    list_corpus,
    read_ids,
    read_row_group,
)
from pipelines.errors import Refused, RunFailed
from tests.pipelines.parquet import destroy_page, flip_bit, invalid_utf8, write

RESERVED = ("id", "summary", "error")


def listed(paths: str | Path | Sequence[str | Path], **options: Any) -> Corpus:
    several = [paths] if isinstance(paths, str | Path) else paths
    settings = {"text_column": "text", "id_column": None, "kept": {}, "reserved": RESERVED}
    return list_corpus([str(p) for p in several], **settings | options)


def problems_of(paths: Any, **options: Any) -> str:
    with pytest.raises(Refused) as refused:
        listed(paths, **options)
    assert refused.value.exit_code == 2
    return "\n".join(refused.value.problems)


def read(corpus: Corpus) -> pa.Table:
    tables = [
        table
        for file in corpus.files
        for index in range(len(file.row_groups))
        for table in read_row_group(corpus, file, index)
    ]
    assert all(table.schema == corpus.schema for table in tables)
    return pa.concat_tables(tables)


def texts(n: int, start: int = 0) -> dict[str, list[str]]:
    return {"text": [f"text {i}" for i in range(start, start + n)]}


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
    assert f"{tmp_path}/empty: matches no Parquet file" in told
    assert f"{tmp_path}/missing: cannot be listed: there is no such file" in told
    assert f"{tmp_path}/*.parquet: matches no Parquet file" in told
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
    assert "no readable Parquet file" in problems_of(tmp_path, skip_bad_files=True)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    write(tmp_path / "a.parquet", table)
    assert "a.parquet: more than one column is called 'text'" in problems_of(tmp_path)


# --- text ---


def test_every_encoding_of_text_is_read_as_one(tmp_path: Path) -> None:
    rows = ["première", None, "", "третий", "a" * 5000]
    kinds = {
        "string": pa.string(),
        "large": pa.large_string(),
        "view": pa.string_view(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
        "large_dictionary": pa.dictionary(pa.int8(), pa.large_string()),
    }
    for name, kind in kinds.items():
        column = pa.array(rows, pa.string()).cast(kind)
        write(tmp_path / f"{name}.parquet", {"text": column, "tag": column})
    table = read(listed(tmp_path, kept={"tag": "tag"}))
    assert table[TEXT].to_pylist() == rows * len(kinds)
    assert table["tag"].to_pylist() == rows * len(kinds)
    assert table.schema.field("tag").type == pa.large_string()


def test_slices_of_a_row_group_are_small(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", texts(600), groups=[0, 600, 0])
    corpus = listed(tmp_path)
    (file,) = corpus.files
    assert file.row_groups == ((0, 0), (0, 600), (600, 0))
    assert [t.num_rows for t in read_row_group(corpus, file, 1)] == [256, 256, 88]
    assert read(corpus)["id"].to_pylist() == [f"a.parquet#{i}" for i in range(600)]
    assert len(ParquetCorpus(corpus).get_read_tasks(99)) == 1


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


@pytest.mark.parametrize("kind", [pa.float64(), pa.bool_(), pa.timestamp("us"), pa.binary()])
def test_other_types_are_no_ids(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path / "a.parquet", {"id": pa.array([None], kind), **texts(1)})
    assert f"id column 'id' is {kind}; ids are strings or integers" in problems_of(tmp_path)


def test_ids_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"id": invalid_utf8([b"fine", b"\xff\xfe"]), **texts(2)})
    assert "a.parquet: id column cannot be read: Invalid UTF8" in problems_of(tmp_path)


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


def test_a_kept_number_that_the_common_type_cannot_hold_ends_the_run(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**texts(1), "n": [2**53 + 1]})
    write(tmp_path / "b.parquet", {**texts(1), "n": [0.5]})
    with pytest.raises(RunFailed, match=r"a\.parquet: kept column 'n' is int64 here and double"):
        read(listed(tmp_path, kept={"n": "n"}))


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


def test_nested_kept_columns_come_through(tmp_path: Path) -> None:
    meta = [{"tags": ["a", "b"], "n": 1}, None]
    write(tmp_path / "a.parquet", {**texts(2), "meta": meta, "text.en": ["x", "y"]})
    table = read(listed(tmp_path, kept={"meta": "meta", "text.en": "english"}))
    assert table["meta"].to_pylist() == meta
    assert table["english"].to_pylist() == ["x", "y"]
    assert table[TEXT].to_pylist() == texts(2)["text"]


# --- pages that do not decode ---


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none", "use_dictionary": False},
        {"compression": "snappy"},
        {"compression": "zstd", "write_page_checksum": True},
    ],
    ids=["plain", "snappy", "checked"],
)
@pytest.mark.parametrize("with_id", [True, False])
def test_a_bad_text_page_makes_error_rows(
    tmp_path: Path, options: dict[str, Any], with_id: bool
) -> None:
    ids = {"id": [f"row {i}" for i in range(30)]} if with_id else {}
    columns = {**ids, **texts(30), "kept": list(range(30))}
    destroy_page(write(tmp_path / "a.parquet", columns, groups=[10, 10, 10], **options), "text", 1)
    table = read(listed(tmp_path, kept={"kept": "kept"}))
    expected = ids.get("id", [f"a.parquet#{i}" for i in range(30)])
    assert table["id"].to_pylist() == expected
    assert table["kept"].to_pylist() == list(range(30))
    good = [*range(10), *range(20, 30)]
    assert [i for i, e in enumerate(table[READ_ERROR].to_pylist()) if e is None] == good
    assert table[TEXT].to_pylist() == [f"text {i}" if i in good else None for i in range(30)]
    assert table[READ_ERROR][10].as_py().startswith("a.parquet, row group 1: ")


def test_rows_before_the_bad_page_are_good(tmp_path: Path) -> None:
    rows = [f"{i:06d} " * 20 for i in range(1000)]
    path = write(
        tmp_path / "a.parquet",
        {"text": rows},
        compression="none",
        use_dictionary=False,
        data_page_size=4096,
        write_batch_size=16,
        write_page_checksum=True,
    )
    flip_bit(path, "text")  # in the last page
    table = read(listed(tmp_path))
    assert table["id"].to_pylist() == [f"a.parquet#{i}" for i in range(1000)]
    assert table[TEXT].to_pylist()[:768] == rows[:768]
    errors = table[READ_ERROR].to_pylist()
    assert errors[:768] == [None] * 768
    assert "crc" in errors[999].lower()


def test_a_changed_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    options = {"compression": "none", "use_dictionary": False}
    for name, checked in (("checked", True), ("unchecked", False)):
        path = tmp_path / f"{name}.parquet"
        write(path, texts(4), write_page_checksum=checked, **options)
        flip_bit(path, "text")
    table = read(listed(tmp_path))
    errors = table[READ_ERROR].to_pylist()
    assert all(errors[:4])
    # Without a checksum nobody can tell: the test above is one of the checksum, not of the bit.
    assert errors[4:] == [None] * 4
    assert table[TEXT].to_pylist()[4:] != texts(4)["text"]


def test_a_bad_kept_page_does_not_lose_the_row(tmp_path: Path) -> None:
    columns = {**texts(20), "kept": [f"k{i}" for i in range(20)]}
    destroy_page(write(tmp_path / "a.parquet", columns, groups=[10, 10]), "kept", 0)
    table = read(listed(tmp_path, kept={"kept": "kept"}))
    assert table["kept"].to_pylist() == [None] * 10 + columns["kept"][10:]
    assert table[TEXT].to_pylist() == columns["text"]
    errors = table[READ_ERROR].to_pylist()
    assert all(errors[:10])
    assert errors[10:] == [None] * 10


def test_a_bad_id_page_is_found_when_listing(tmp_path: Path) -> None:
    columns = {"id": [f"row {i}" for i in range(20)], **texts(20)}
    destroy_page(write(tmp_path / "bad.parquet", columns, groups=[10, 10]), "id", 1)
    write(tmp_path / "good.parquet", {"id": ["a"], **texts(1)})
    assert "bad.parquet: id column cannot be read" in problems_of(tmp_path)
    corpus = listed(tmp_path, skip_bad_files=True)
    assert names(corpus) == ["good.parquet"]
    assert list(corpus.skipped) == ["bad.parquet"]


def test_text_that_is_not_utf8_is_read_as_it_is(tmp_path: Path) -> None:
    column = invalid_utf8([b"fine", b"\xff\xfe broken", None])
    write(tmp_path / "a.parquet", {"text": column})
    table = read(listed(tmp_path))
    assert table[TEXT].cast(pa.large_binary()).to_pylist() == [b"fine", b"\xff\xfe broken", None]


# --- files that change ---


def test_a_file_that_changes_after_listing_ends_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", texts(4))
    corpus = listed(tmp_path)
    (file,) = corpus.files
    whole, stat = path.read_bytes(), path.stat()

    def refused() -> None:
        with pytest.raises(RunFailed, match=r"a\.parquet was changed or removed"):
            list(read_row_group(corpus, file, 0))

    write(path, texts(4, start=4))  # as many rows and bytes, other texts
    assert path.stat().st_size == stat.st_size
    refused()
    write(path, texts(5))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused()
    path.unlink()
    refused()
    path.write_bytes(whole)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read(corpus).num_rows == 4


def test_the_listing_tells_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", texts(4))
    before = listed(tmp_path).listing()
    assert list(before) == ["a.parquet"]
    assert listed(tmp_path).listing() == before
    assert listed(tmp_path, limit=3).listing() != before
    os.utime(path, ns=(0, 5))
    assert listed(tmp_path).listing() != before


# --- any layout ---


@settings(max_examples=40, deadline=None)
@given(
    layout=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=4),
    limit=st.none() | st.integers(1, 60),
    with_id=st.booleans(),
    slice_rows=st.integers(1, 12),
)
def test_any_layout_and_limit_yields_the_same_rows_in_order(
    layout: list[list[int]], limit: int | None, with_id: bool, slice_rows: int
) -> None:
    total = sum(map(sum, layout))
    expected = [f"text {i}" for i in range(total)][:limit]
    with tempfile.TemporaryDirectory() as folder:
        start, made = 0, []
        for number, groups in enumerate(layout):
            count = sum(groups)
            name = f"{number // 2}/{number}.parquet"
            made += [f"{name}#{row}" for row in range(count)]
            rows = texts(count, start)["text"]
            columns = {"text": pa.array(rows, pa.string())}
            if with_id:
                columns["id"] = pa.array(range(start, start + count), pa.int64())
            write(Path(folder, name), columns, groups=groups)
            start += count
        if not expected:
            problems_of(folder, limit=limit)
            return
        corpus = listed(folder, limit=limit)
        with mock.patch.object(corpus_module, "SLICE_ROWS", slice_rows):
            table = read(corpus)
    assert corpus.num_rows == len(expected)
    assert table[TEXT].to_pylist() == expected
    ids = [str(i) for i in range(total)] if with_id else made
    assert table["id"].to_pylist() == ids[:limit]
    assert table[READ_ERROR].null_count == len(expected)


def test_row_groups_are_read_from_the_file_of_their_own(tmp_path: Path) -> None:
    """Read tasks carry one file each and can be run in any order."""
    write(tmp_path / "a.parquet", texts(5), groups=[2, 3])
    write(tmp_path / "b.parquet", texts(4, start=5), groups=[4])
    tasks = ParquetCorpus(listed(tmp_path, limit=7)).get_read_tasks(1)
    blocks = [pa.concat_tables(list(task())) for task in tasks]
    assert [b[TEXT].to_pylist() for b in blocks] == [
        ["text 0", "text 1"],
        ["text 2", "text 3", "text 4"],
        ["text 5", "text 6"],
    ]
    assert [task.metadata.num_rows for task in tasks] == [2, 3, 2]
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 2
