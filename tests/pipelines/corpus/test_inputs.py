"""What a task reads: one column or several, words, fields of structs, prefixes."""

import doctest
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import pipelines.corpus.listing
import pipelines.rows
from pipelines.corpus.listing import READ_ERROR, TEXT
from pipelines.rows import InputColumn
from tests.pipelines.parquet import invalid_utf8, listed, problems_of, read, texts, write


def test_columns_are_joined_without_their_nulls(tmp_path: Path) -> None:
    columns = {
        "title": ["a", None, "c", None],
        "body": pa.array(["A", "B", None, None]).dictionary_encode(),
    }
    write(tmp_path / "a.parquet", columns)
    joined = InputColumn("text", ("title", "body"), separator=": ")
    table = read(listed(tmp_path, inputs=[joined]))
    assert table[TEXT].to_pylist() == ["a: A", "B", "c", None]
    assert table.schema.field(TEXT).type == pa.large_string()


def test_a_prefix_stands_before_a_text_that_is_not_blank(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"text": ["x", "", " \u00a0\n", None]})
    told = InputColumn("text", ("text",), prefix="Summarize: ")
    assert read(listed(tmp_path, inputs=[told]))[TEXT].to_pylist() == [
        "Summarize: x",
        "",
        " \u00a0\n",
        None,
    ]


def test_a_prefix_and_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"text": invalid_utf8([b"fine", b"\xff"]), "b": ["x", "y"]})
    given = InputColumn("text", ("text", "b"), separator="+", prefix="> ")
    table = read(listed(tmp_path, inputs=[given]))
    assert table[TEXT].cast(pa.large_binary()).to_pylist() == [b"> fine+x", b"> \xff+y"]


def test_several_roles(tmp_path: Path) -> None:
    columns = {"q": ["why?"], "text": ["so"], "choices": [["a", "b"]]}
    write(tmp_path / "a.parquet", columns)
    corpus = listed(
        tmp_path,
        inputs=[
            InputColumn("text", ("text",)),
            InputColumn("question", ("q",)),
            InputColumn("choices", ("choices",), "words"),
        ],
    )
    table = read(corpus)
    names = ["id", "__text", "__question", "__choices", "__read_error"]
    assert table.schema == corpus.schema
    assert table.schema.names == names
    assert table.schema.field("__choices").type == pa.large_list(pa.large_string())
    assert table.to_pylist()[0] == dict(
        zip(names, ["a.parquet#0", "so", "why?", ["a", "b"], None], strict=True)
    )


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.string(), 2),
    ],
)
def test_words_of_every_list_type(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path / "a.parquet", {"w": pa.array([["a", None], None], kind)})
    write(tmp_path / "b.parquet", {"w": pa.nulls(1)})
    words = InputColumn("words", ("w",), "words")
    assert read(listed(tmp_path, inputs=[words]))["__words"].to_pylist() == [
        ["a", None],
        None,
        None,
    ]


def test_words_that_are_none(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"w": ["a b"], "n": [[1]], "text": [["a"]]})
    words = [InputColumn("words", ("w",), "words"), InputColumn("other", ("n",), "words")]
    told = problems_of(tmp_path, inputs=[*words, InputColumn("text", ("text",))])
    assert "a.parquet: words column 'w' is string, not a list of strings" in told
    assert "a.parquet: other column 'n' is list<element: int64>, not a list of strings" in told
    assert "a.parquet: text column 'text' is list<element: string>, not a string" in told


def test_an_input_that_is_not_required(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**texts(1), "q": ["why?"]})
    write(tmp_path / "b.parquet", texts(1))
    inputs = [InputColumn("text", ("text",)), InputColumn("question", ("q",), required=False)]
    assert read(listed(tmp_path, inputs=inputs))["__question"].to_pylist() == ["why?", None]
    asked = [InputColumn("text", ("text",)), InputColumn("question", ("q",))]
    assert "b.parquet: no column 'q'" in problems_of(tmp_path, inputs=asked)


def test_fields_of_structs(tmp_path: Path) -> None:
    rows = [
        {"document": {"body": "x", "meta": {"lang": "en", "key": "k1"}}},
        {"document": {"body": None, "meta": {"lang": "fr", "key": "k2"}}},
        {"document": {"body": "z", "meta": {"lang": None, "key": "k3"}}},
    ]
    write(tmp_path / "a.parquet", pa.Table.from_pylist(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = [
        read(
            listed(
                tmp_path / name,
                inputs=[InputColumn("text", ("document.body",))],
                kept={"document.meta.lang": "language", "document.meta": "meta"},
                id_column="document.meta.key",
            )
        )
        for name in ("a.parquet", "b.jsonl")
    ]
    for table in results:
        assert table["id"].to_pylist() == ["k1", "k2", "k3"]
        assert table[TEXT].to_pylist() == ["x", None, "z"]
        assert table["language"].to_pylist() == ["en", "fr", None]
        assert table["meta"].to_pylist() == [r["document"]["meta"] for r in rows]


def test_a_column_of_the_very_name_comes_before_a_field(tmp_path: Path) -> None:
    columns = {"document.body": ["flat"], "document": [{"body": "nested"}]}
    write(tmp_path / "a.parquet", columns)
    table = read(listed(tmp_path, inputs=[InputColumn("text", ("document.body",))]))
    assert table[TEXT].to_pylist() == ["flat"]


def test_fields_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"document": [{"body": 1}]})
    told = problems_of(tmp_path, inputs=[InputColumn("text", ("document.text",))])
    assert "a.parquet: no column 'document.text'; it has 'document'" in told
    told = problems_of(tmp_path, inputs=[InputColumn("text", ("document.body",))])
    assert "text column 'document.body' is int64, not a string" in told


def test_the_source_columns_come_back_as_they_were(tmp_path: Path) -> None:
    columns = {"title": ["a", None], "body": ["A", "B"], "w": [["x"], None]}
    write(tmp_path / "a.parquet", columns)
    inputs = [
        InputColumn("text", ("title", "body"), prefix="> "),
        InputColumn("words", ("w",), "words"),
    ]
    source = listed(tmp_path, inputs=inputs).unjoined()
    table = read(source)
    for given in source.inputs:
        assert table[given.name].to_pylist() == columns[given.columns[0]]
    assert len(source.inputs) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"role": "a b", "columns": ("x",)},
        {"role": "id", "columns": ("x",)},
        {"role": "text", "columns": ()},
        {"role": "text", "columns": ("x", "x")},
        {"role": "words", "columns": ("x", "y"), "kind": "words"},
        {"role": "words", "columns": ("x",), "kind": "words", "prefix": "p"},
    ],
)
def test_inputs_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="input"):
        InputColumn(**wrong)


def test_the_fingerprint_of_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**texts(1), "title": ["t"], "year": [1]})
    kept = {"year": "year"}
    # Recorded in the run directories of earlier releases.
    plain = {"text": "text", "id": "file#row", "kept": kept}
    assert listed(tmp_path, kept=kept).column_fingerprint() == plain
    changes = [
        InputColumn("text", ("title",)),
        InputColumn("text", ("title", "text")),
        InputColumn("text", ("title", "text"), separator=" "),
        InputColumn("text", ("text",), prefix="p"),
    ]
    told = [listed(tmp_path, inputs=[c], kept=kept).column_fingerprint() for c in changes]
    assert all(told.count(one) == 1 and one != plain for one in told)
    assert json.loads(json.dumps(told)) == told


def test_kept_strings_that_are_not_utf8_are_errors_of_their_rows(tmp_path: Path) -> None:
    bad = invalid_utf8([b"fine", b"caf\xe9", None])
    nested = pa.ListArray.from_arrays([0, 1, 2, 3], invalid_utf8([b"a", b"b", b"\xff"]))
    write(tmp_path / "a.parquet", {**texts(3), "title": bad, "tags": nested})
    table = read(listed(tmp_path, kept={"title": "title", "tags": "tags"}))
    table.validate(full=True)
    assert table["title"].to_pylist() == ["fine", None, None]
    assert table["tags"].to_pylist() == [["a"], ["b"], None]
    assert table[READ_ERROR].to_pylist() == [
        None,
        "kept column 'title' is not valid UTF-8",
        "kept column 'tags' is not valid UTF-8",
    ]
    assert table[TEXT].to_pylist() == texts(3)["text"]


@pytest.mark.parametrize("module", [pipelines.corpus.listing, pipelines.rows])
def test_the_examples(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"key": "a", "title": "T", "body": "B"}, {"key": "b", "title": None, "body": "C"}]
    (tmp_path / "reports.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed
