"""Reading of listed corpora: every row, or the reason why not."""

import datetime
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus import formats
from pipelines.corpus.listing import READ_ERROR, TEXT
from pipelines.corpus.reading import CorpusDatasource, read_piece
from pipelines.errors import RunFailed
from tests.pipelines.parquet import (
    destroy_page,
    flip_bit,
    invalid_utf8,
    listed,
    problems_of,
    read,
    texts,
    write,
)


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
    (piece,) = file.pieces
    assert [t.num_rows for t in read_piece(corpus, file, piece)] == [256, 256, 88]
    assert read(corpus)["id"].to_pylist() == [f"a.parquet#{i}" for i in range(600)]
    assert len(CorpusDatasource(corpus).get_read_tasks(99)) == 1


def test_a_kept_number_that_the_common_type_cannot_hold_ends_the_run(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**texts(1), "n": [2**53 + 1]})
    write(tmp_path / "b.parquet", {**texts(1), "n": [0.5]})
    with pytest.raises(RunFailed, match=r"a\.parquet: kept column 'n' is int64 here and double"):
        read(listed(tmp_path, kept={"n": "n"}))


def test_nested_kept_columns_come_through(tmp_path: Path) -> None:
    meta = [{"tags": ["a", "b"], "n": 1}, None]
    write(tmp_path / "a.parquet", {**texts(2), "meta": meta, "text.en": ["x", "y"]})
    table = read(listed(tmp_path, kept={"meta": "meta", "text.en": "english"}))
    assert table["meta"].to_pylist() == meta
    assert table["english"].to_pylist() == ["x", "y"]
    assert table[TEXT].to_pylist() == texts(2)["text"]


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


def test_text_that_is_not_utf8_is_read_as_it_is(tmp_path: Path) -> None:
    column = invalid_utf8([b"fine", b"\xff\xfe broken", None])
    write(tmp_path / "a.parquet", {"text": column})
    table = read(listed(tmp_path))
    assert table[TEXT].cast(pa.large_binary()).to_pylist() == [b"fine", b"\xff\xfe broken", None]


def test_a_file_that_changes_after_listing_ends_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", texts(4))
    corpus = listed(tmp_path)
    (file,) = corpus.files
    whole, stat = path.read_bytes(), path.stat()

    def refused() -> None:
        with pytest.raises(RunFailed, match=r"a\.parquet was changed or removed"):
            list(read_piece(corpus, file, *file.pieces))

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
        with mock.patch.object(formats, "SLICE_ROWS", slice_rows):
            table = read(corpus)
    assert corpus.num_rows == len(expected)
    assert table[TEXT].to_pylist() == expected
    ids = [str(i) for i in range(total)] if with_id else made
    assert table["id"].to_pylist() == ids[:limit]
    assert table[READ_ERROR].null_count == len(expected)


def test_read_tasks_carry_one_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PIECE_BYTES", 1)
    write(tmp_path / "a.parquet", texts(5), groups=[2, 3])
    write(tmp_path / "b.parquet", texts(4, start=5), groups=[4])
    tasks = CorpusDatasource(listed(tmp_path, limit=7)).get_read_tasks(1)
    blocks = [pa.concat_tables(list(task())) for task in tasks]
    assert [b[TEXT].to_pylist() for b in blocks] == [
        ["text 0", "text 1"],
        ["text 2", "text 3", "text 4"],
        ["text 5", "text 6"],
    ]
    assert [task.metadata.num_rows for task in tasks] == [2, 3, 2]
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 2


def test_small_row_groups_are_read_by_one_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {**texts(40), "unread": ["x" * 9999] * 40}
    write(tmp_path / "a.parquet", columns, groups=[1] * 40, compression="none")
    corpus = listed(tmp_path)
    assert [(p.first_row, p.num_rows) for p in corpus.files[0].pieces] == [(0, 40)]
    monkeypatch.setattr(formats, "PIECE_BYTES", 600)  # what nobody reads is not counted
    cut = listed(tmp_path)
    sizes = [p.num_rows for p in cut.files[0].pieces]
    assert 2 < len(sizes) < 20
    assert read(cut) == read(corpus)
    opened = []
    open_file = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda *a, **k: opened.append(1) or open_file(*a, **k))
    read(corpus)
    assert len(opened) == 1


def test_a_bad_page_between_small_row_groups(tmp_path: Path) -> None:
    columns = {"id": [f"row {i}" for i in range(6)], **texts(6)}
    path = write(tmp_path / "a.parquet", columns, groups=[1] * 6)
    for group in (1, 4):
        destroy_page(path, "text", group)
    (file,) = (corpus := listed(tmp_path)).files
    assert len(file.pieces) == 1
    table = read(corpus)
    assert table["id"].to_pylist() == columns["id"]
    assert [i for i, e in enumerate(table[READ_ERROR].to_pylist()) if e] == [1, 4]
    assert table[READ_ERROR][4].as_py().startswith("a.parquet, row group 4: ")


def test_large_cells_are_read_in_small_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [str(i) * 10_000 for i in range(50)]
    write(tmp_path / "a.parquet", {"text": rows}, use_dictionary=False)
    corpus = listed(tmp_path)
    (file,) = corpus.files
    monkeypatch.setattr(formats, "SLICE_BYTES", 100_000)
    tables = list(read_piece(corpus, file, *file.pieces))
    assert max(t.num_rows for t in tables) <= 10
    assert pa.concat_tables(tables)[TEXT].to_pylist() == rows


def test_timestamps_of_spark_are_kept_as_they_are(tmp_path: Path) -> None:
    when = [datetime.datetime(9999, 12, 31, 23, 59, 59), datetime.datetime(2024, 1, 1, 0, 0, 0, 7)]
    columns = {**texts(2), "valid_to": pa.array(when, pa.timestamp("us"))}
    write(tmp_path / "a.parquet", columns, use_deprecated_int96_timestamps=True)
    assert read(listed(tmp_path, kept={"valid_to": "to"}))["to"].to_pylist() == when
