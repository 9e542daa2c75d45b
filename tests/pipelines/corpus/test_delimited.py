"""CSV and TSV: every field as it stands in the file, or a refusal."""

import csv
import gzip
import io
import tempfile
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus import delimited
from pipelines.corpus.listing import TEXT
from pipelines.rows import InputColumn
from tests.pipelines.parquet import listed, problems_of, read


def test_no_type_is_guessed(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbfid,text,k,d\r\n007,"a\r\n""b"", c",1.10,2024-01-01\r\n008,,NA,\r\n'
    (tmp_path / "a.csv").write_bytes(data)
    corpus = listed(tmp_path, kept={"k": "k", "d": "day"})
    assert corpus.id_column == "id"
    table = read(corpus)
    assert table["id"].to_pylist() == ["007", "008"]
    assert table[TEXT].to_pylist() == ['a\r\n"b", c', ""]
    assert table["k"].to_pylist() == ["1.10", "NA"]
    assert table["day"].to_pylist() == ["2024-01-01", ""]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.tsv", b"text\tb\nx,y\t1\n", ["x,y"]),
        ("a.csv.gz", gzip.compress(b"text\nx\n", mtime=0), ["x"]),
        ("A.CSV", b"text,b\rx,1\ry,2", ["x", "y"]),
        ("a.csv", b"text,b\n\nx,1\n\n", ["x"]),
        ("a.csv", b'text,b\nx,"1\n2"\n', ["x"]),
    ],
    ids=["tab", "gzip", "carriage returns", "blank lines", "a quoted end"],
)
def test_unusual_files(tmp_path: Path, name: str, data: bytes, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(data)
    table = read(listed(tmp_path))
    assert table[TEXT].to_pylist() == expected
    assert table["id"].to_pylist() == [f"{name}#{i}" for i in range(len(expected))]


def test_text_that_is_not_utf8_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,b\ncaf\xe9,1\n")
    assert read(listed(tmp_path))[TEXT].cast(pa.large_binary()).to_pylist() == [b"caf\xe9"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"id,text\n1,a\n2,b,c\n", "Row #3: Expected 2 columns, got 3"),
        (b"id,text\n1,a\n2\n", "Row #3: Expected 2 columns, got 1"),
        (b'id,text\n1,a\n2,"b\n3,c\n', "its last quote is never closed"),
        (b'id,text\n1,a\n2,"b', "its last quote is never closed"),
        (b'text\na\n"b', "its last quote is never closed"),
        ("id,text\n1,a\n".encode("utf-16"), "UTF-16"),
        (b"id,caf\xe9\n1,a\n", "utf-8"),
        (b"\n", "Empty CSV file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("block_bytes", [32, 2**20])
def test_bad_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, said: str, block_bytes: int
) -> None:
    monkeypatch.setattr(delimited, "_BLOCK_BYTES", block_bytes)
    (tmp_path / "bad.csv").write_bytes(data)
    (tmp_path / "good.csv").write_text("text,b\nx,1\n")
    told = problems_of(tmp_path)
    assert "bad.csv: is not a readable CSV file" in told
    assert said in told
    assert list(listed(tmp_path, skip_bad_files=True).skipped) == ["bad.csv"]


def test_a_row_larger_than_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(delimited, "_LARGEST_BLOCK", 1024)
    (tmp_path / "a.csv").write_text("text,b\n" + "x,1\n" * 50 + f'"{"y" * 5000}",1\n')
    assert "a row takes more than 1,024 bytes" in problems_of(tmp_path)


def test_columns_of_one_name_and_columns_of_lists(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\nx,y\n")
    assert "more than one column is called 'text'" in problems_of(tmp_path)
    (tmp_path / "a.csv").write_text("text;b\nx;1\n")
    assert "no column 'text'; it has 'text;b'" in problems_of(tmp_path)
    (tmp_path / "a.csv").write_text("w\nx y\n")
    told = problems_of(tmp_path, inputs=[InputColumn("words", ("w",), "words")])
    assert "words column 'w' is large_string, not a list of strings" in told


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=30),
    limit=st.none() | st.integers(1, 35),
    block_bytes=st.integers(40, 400),
    ending=st.sampled_from(["\n", "\r\n"]),
    delimiter=st.sampled_from([",", "\t"]),
)
def test_what_python_writes_is_read_back(
    rows: list[tuple[str, str]], limit: int | None, block_bytes: int, ending: str, delimiter: str
) -> None:
    sink = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL
    writer = csv.writer(sink, delimiter=delimiter, lineterminator=ending, quoting=quoting)
    writer.writerows([("text", "more"), *rows])
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(delimited, "_BLOCK_BYTES", block_bytes),
    ):
        name = "a.csv" if delimiter == "," else "a.tsv"
        Path(folder, name).write_bytes(sink.getvalue().encode())
        table = read(listed(folder, limit=limit, kept={"more": "more"}))
    assert table[TEXT].to_pylist() == [text for text, _ in rows][:limit]
    assert table["more"].to_pylist() == [more for _, more in rows][:limit]
    assert table["id"].to_pylist() == [f"{name}#{i}" for i in range(len(rows))][:limit]
