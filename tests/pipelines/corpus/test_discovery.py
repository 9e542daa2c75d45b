"""Which files a path means: one format, no table of another system, no run of our own."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.corpus.discovery import format_of
from pipelines.storage import locate
from tests.pipelines.parquet import listed, problems_of, read, texts, write

LINE = '{"text": "a"}\n'


def put(path: Path, data: str = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data)
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.parquet", "Parquet"),
        ("a.parq", "Parquet"),
        ("a.pq", "Parquet"),
        ("a.PARQUET", "Parquet"),
        ("a.jsonl", "JSON Lines"),
        ("a.ndjson.gz", "JSON Lines"),
        ("a.JSON.ZST", "JSON Lines"),
        ("a.csv", "CSV"),
        ("a.tsv.gz", "TSV"),
        ("a.parquet.gz", None),
        ("a.txt", None),
        ("jsonl", None),
    ],
)
def test_a_name_tells_the_format(name: str, expected: str | None) -> None:
    found = format_of(f"some.csv/{name}")
    assert (found.name if found else None) == expected


def test_other_endings_of_parquet(tmp_path: Path) -> None:
    for name in ("a.parq", "b.pq", "c.PARQUET"):
        write(tmp_path / name, texts(1))
    assert [f.name for f in listed(tmp_path).files] == ["a.parq", "b.pq", "c.PARQUET"]


def test_a_directory_of_json_lines_or_csv(tmp_path: Path) -> None:
    put(tmp_path / "json/x/a.jsonl")
    put(tmp_path / "json/b.json")
    put(tmp_path / "json/_c.json")
    put(tmp_path / "csv/a.csv", "text\na\n")
    assert [f.name for f in listed(tmp_path / "json").files] == ["b.json", "x/a.jsonl"]
    both = listed([tmp_path / "json", tmp_path / "csv"])
    assert [f.name for f in both.files] == ["csv/a.csv", "json/b.json", "json/x/a.jsonl"]
    assert read(both)["__text"].to_pylist() == ["a", "a", "a"]


def test_a_directory_of_several_formats_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", texts(1))
    put(tmp_path / "dataset_info.json", "{}")
    assert [f.name for f in listed(tmp_path).files] == ["a.parquet"]
    put(tmp_path / "b.jsonl")
    told = problems_of(tmp_path)
    assert "several formats, 'JSON Lines', 'Parquet'" in told
    assert f"glob, for example {tmp_path}/**/*.parquet" in told
    assert [f.name for f in listed(f"{tmp_path}/**/*.parquet").files] == ["a.parquet"]
    assert [f.name for f in listed(f"{tmp_path}/*.jsonl").files] == ["b.jsonl"]


@pytest.mark.parametrize(
    ("marker", "name"),
    [
        ("_delta_log/0.json", "Delta Lake"),
        ("metadata/v1.metadata.json", "Apache Iceberg"),
        (".hoodie/hoodie.properties", "Apache Hudi"),
    ],
)
def test_tables_are_refused_by_name(tmp_path: Path, marker: str, name: str) -> None:
    write(tmp_path / "all/table/data/a.parquet", texts(1))
    put(tmp_path / "all/table" / marker)
    for path in ("all", "all/table", "al*"):
        told = problems_of(tmp_path / path)
        assert f"a table of {name}" in told
        assert "glob" in told
    assert listed(f"{tmp_path}/all/table/data/*.parquet").num_rows == 1


@pytest.mark.parametrize(
    ("given", "output", "refused"),
    [
        ("in", "in/run", True),
        ("in", "in", True),
        ("in/run/dead_letter", "in/run", True),
        ("in", "in/_runs/1", False),
        ("in", "in2", False),
        ("in/*.parquet", "in/run", False),
        ("in/**/*.parquet", "in/run", True),
        ("in/*", "in/run", True),
        ("in/a*", "in/run", False),
        ("in/a.parquet", "in/run", False),
    ],
)
def test_the_output_may_not_become_input(
    tmp_path: Path, given: str, output: str, refused: bool
) -> None:
    for name in ("in/a.parquet", "in/run/dead_letter/a.parquet"):
        write(tmp_path / name, texts(1))
    target = locate(str(tmp_path / output))
    if refused:
        told = problems_of(tmp_path / given, output=target)
        assert f"--output {tmp_path}/{output} and --input {tmp_path}/{given}" in told
        assert "outside" in told
    else:
        assert listed(tmp_path / given, output=target).num_rows


def test_columns_that_folders_give(tmp_path: Path) -> None:
    for folder in ("year=007/lang=a%20b", "year=__HIVE_DEFAULT_PARTITION__/lang=fr"):
        write(tmp_path / folder / "a.parquet", texts(1))
    table = read(listed(tmp_path, kept={"year": "year", "lang": "language"}))
    assert table["year"].to_pylist() == ["007", None]
    assert table["language"].to_pylist() == ["a b", "fr"]
    told = problems_of(tmp_path, kept={"month": "month"})
    assert "no column 'month'; it has 'text', and folders give 'year', 'lang'" in told


def test_a_folder_and_a_number_have_no_common_type(tmp_path: Path) -> None:
    write(tmp_path / "year=2024/a.parquet", texts(1))
    write(tmp_path / "b.parquet", {**texts(1), "year": pa.array([2024])})
    assert "no common type" in problems_of(tmp_path, kept={"year": "year"})
