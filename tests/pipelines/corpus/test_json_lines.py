"""JSON Lines: the rows of a Parquet file of the same content, or a refusal that names the row."""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus import formats, json_lines
from pipelines.corpus.listing import TEXT, read_ids
from tests.pipelines.parquet import listed, problems_of, read, write

# Of one time: the name of a test holds its bytes.
TRUNCATED = gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9]


def lines(rows: list[Any]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def test_it_reads_what_parquet_reads(tmp_path: Path) -> None:
    rows = [{"id": f"{i:03d}", "text": f"é {i}\r\n", "n": i, "tags": ["a"] * i} for i in range(9)]
    write(tmp_path / "a.parquet", pa.Table.from_pylist(rows))
    (tmp_path / "a.jsonl").write_text(lines(rows))
    kept = {"n": "n", "tags": "tags"}
    tables = [
        read(listed(tmp_path / name, kept=kept)).to_pylist() for name in ("a.parquet", "a.jsonl")
    ]
    assert tables[0] == tables[1]
    assert tables[1][8]["id"] == "008"


@pytest.mark.parametrize(
    "data",
    [
        b'\xef\xbb\xbf{"text":"a"}\n{"text":"b"}\n',
        b'{"text":"a"}\r\n\r\n{"text":"b"}\r\n',
        b'{"text":"a"}\n\n  \n{"text":"b"}',
        b'{"other":1,"text":"a"}\n{"text":"b","other":{"x":[]}}',
    ],
    ids=["bom", "crlf", "blank lines and no last line break", "an unwanted column of two types"],
)
def test_unusual_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.ndjson").write_bytes(data)
    table = read(listed(tmp_path))
    assert table["id"].to_pylist() == ["a.ndjson#0", "a.ndjson#1"]
    assert table[TEXT].to_pylist() == ["a", "b"]


def test_strings_that_look_like_times_stay_strings(tmp_path: Path) -> None:
    row = {"text": "2024-01-01", "day": "2024-01-01 10:00:00", "n": [{"d": "2024-01-01T00:00:00Z"}]}
    (tmp_path / "a.jsonl").write_text(lines([row]))
    table = read(listed(tmp_path, kept={"day": "day", "n": "n"}))
    assert table[TEXT].to_pylist() == [row["text"]]
    assert table["day"].to_pylist() == [row["day"]]
    assert table["n"].to_pylist() == [row["n"]]


def test_text_that_is_not_utf8_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text":"\xff"}\n')
    assert read(listed(tmp_path))[TEXT].cast(pa.large_binary()).to_pylist() == [b"\xff"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"text":"b"', "in row 70"),
        ('{"text":}', "Invalid value. in row 70"),
        ('["text"]', "changed from object to array in row 70"),
        ('{"text":"a","text":"b"}', "specified twice in row 70"),
        ('{"text":"\\ud800"}', "surrogate pair in string is invalid. in row 70"),
        ('{"text":5}', "several types"),
    ],
)
@pytest.mark.parametrize("block_bytes", [64, 2**20])
def test_a_bad_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, said: str, block_bytes: int
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", block_bytes)
    good = lines([{"text": f"row {i}", "more": i} for i in range(70)])
    (tmp_path / "bad.jsonl").write_text(f"{good}{bad}\n{good}")
    (tmp_path / "good.jsonl").write_text(good)
    told = problems_of(tmp_path)
    assert "bad.jsonl: is not a readable JSON Lines file" in told
    assert said in told
    assert "good.jsonl" not in told
    corpus = listed(tmp_path, skip_bad_files=True)
    assert list(corpus.skipped) == ["bad.jsonl"]
    assert read(corpus).num_rows == 70


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.json", b'[{"text": "a"}]', "it is one JSON array; write one object a line"),
        ("a.json", json.dumps({"text": "a"}, indent=1).encode(), "JSON parse error"),
        ("a.jsonl", '{"text":"a"}'.encode("utf-16"), "UTF-16"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (
            "a.jsonl.gz",
            gzip.compress(lines([{"text": "a"}] * 999).encode(), mtime=0)[:-9],
            "Truncated",
        ),
        ("a.jsonl.gz", b'{"text": "a"}', "incorrect header"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    told = problems_of(tmp_path)
    assert f"{name}: is not a readable JSON Lines file" in told
    assert said in told


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_compressed_files_are_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(formats, "PIECE_BYTES", 64)
    data = lines([{"text": f"row {i}"} for i in range(40)]).encode()
    path = tmp_path / {"gzip": "a.json.gz", "zstd": "a.jsonl.zst"}[codec]
    path.write_bytes(pa.Codec(codec).compress(data, asbytes=True))
    corpus = listed(tmp_path)
    assert corpus.num_pieces == 1
    assert read(corpus)[TEXT].to_pylist() == [f"row {i}" for i in range(40)]


def test_types_are_those_of_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", 64)
    rows = [
        {"text": "a", "n": 1, "meta": None},
        *({"text": "b" * 99} for _ in range(3)),
        {"text": "c", "n": 0.5, "meta": {"x": []}},
        {"text": "d", "meta": {"x": ["y"], "z": 1}},
    ]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    corpus = listed(tmp_path, kept={"n": "n", "meta": "meta"})
    assert corpus.kept_schema.field("n").type == pa.float64()
    table = read(corpus)
    assert table["n"].to_pylist() == [1.0, None, None, None, 0.5, None]
    assert table["meta"].to_pylist()[4:] == [{"x": [], "z": None}, {"x": ["y"], "z": 1}]
    assert table["meta"].to_pylist()[0] is None


def test_a_kept_column_of_two_types_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block_bytes in (32, 2**20):
        monkeypatch.setattr(json_lines, "_BLOCK_BYTES", block_bytes)
        (tmp_path / "a.jsonl").write_text(
            lines([{"text": "a", "year": 1999}] * 9 + [{"text": "a", "year": "1999"}])
        )
        assert "several types" in problems_of(tmp_path, kept={"year": "year"})
        assert read(listed(tmp_path)).num_rows == 10


def test_a_number_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": 1}]))
    assert "a.jsonl: text column 'text' is int64, not a string" in problems_of(tmp_path)


def test_a_line_longer_than_arrow_can_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(json_lines, "_LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_text(lines([{"text": "a" * 900}]))
    assert read(listed(tmp_path))[TEXT].to_pylist() == ["a" * 900]
    (tmp_path / "a.jsonl").write_text(lines([{"text": "a" * 1100}]))
    assert "a line of more than 1,000 bytes" in problems_of(tmp_path)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.text(max_size=90) | st.none(), min_size=1, max_size=40),
    limit=st.none() | st.integers(1, 45),
    block_bytes=st.integers(1, 400),
    piece_bytes=st.integers(1, 1000),
    with_id=st.booleans(),
    ascii_only=st.booleans(),
)
def test_any_cut_yields_the_same_rows_in_order(
    rows: list[str | None],
    limit: int | None,
    block_bytes: int,
    piece_bytes: int,
    with_id: bool,
    ascii_only: bool,
) -> None:
    ids = {"id": 0} if with_id else {}
    data = [{"text": row} | dict.fromkeys(ids, i) for i, row in enumerate(rows)]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(json_lines, "_BLOCK_BYTES", block_bytes),
        mock.patch.object(formats, "PIECE_BYTES", piece_bytes),
    ):
        written = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in data)
        Path(folder, "a.jsonl").write_text(written, encoding="utf-8", newline="\n")
        corpus = listed(folder, limit=limit)
        table = read(corpus)
        (file,) = corpus.files
        assert read_ids(corpus, file).to_pylist() == table["id"].to_pylist()
    assert table[TEXT].to_pylist() == rows[:limit]
    expected = [str(i) if with_id else f"a.jsonl#{i}" for i in range(len(rows))]
    assert table["id"].to_pylist() == expected[:limit]
