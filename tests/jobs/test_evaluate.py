"""`longhaul evaluate` says of a run's rows what the metrics say, called directly."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from longformer_core import metrics
from tests.pipelines.driving import rows_of
from tests.pipelines.every_task import CASES, LABELS, command, flags, good_rows, write_rows

NUM_ROWS, FAILED, BARE = 8, 2, 5  # rows, the one that fails, the one without a reference


@pytest.fixture
def finished(
    model_of: Callable[[str], Path], ray_session: None, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Run a task over rows, one of which fails; return the rows of the run by id."""

    def run(name: str, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        corpus = write_rows(tmp_path / "in" / "rows.parquet", rows)
        given = {"max_errors": "1"} | options
        assert command(flags(CASES[name], model_of(name), corpus, tmp_path / "run", **given)) == 0
        return rows_of(tmp_path / "run")

    return run


def rows_with(column: str, references: Sequence[Any], **failing: Any) -> list[dict[str, Any]]:
    """Rows with a column of references; one of them fails, one has no reference."""
    rows = good_rows(NUM_ROWS)
    for number, (row, reference) in enumerate(zip(rows, references, strict=True)):
        row[column] = None if number == BARE else reference
    rows[FAILED] |= failing
    return rows


def scored(place: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What the command prints, which is what it writes."""
    capsys.readouterr()
    assert command(["evaluate", str(place), "--format", "json", *words]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told == json.loads((place / "evaluation.json").read_text())
    assert told["rows"] == NUM_ROWS - 1
    assert told["rows_without_reference"] == 1
    assert told["rows_failed"] == 1
    return told


def assert_scores(
    place: Path, told: dict[str, Any], scores: metrics.Scores, ids: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The numbers are these, of the whole and of every row; returns what was written of each."""
    assert told["scores"] == pytest.approx(scores.summary)
    assert scores.num_failed == told["rows_failed"]
    written = {row["id"]: row for row in pq.read_table(place / "evaluation.parquet").to_pylist()}
    assert sorted(written) == sorted(ids)
    for name, own in zip(ids, scores.per_row, strict=True):
        assert {key: written[name][key] for key in own} == pytest.approx(own)
        assert written[name].keys() >= {"id", "reference", "prediction"}
    return written


def test_summaries(
    finished: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    rows = rows_with("abstract", [row["query"] for row in good_rows(NUM_ROWS)], text=None)
    found = finished("summarize", rows, keep_columns="abstract")
    kept = [row for row in rows if row["abstract"] is not None]
    summaries = [found[row["id"]]["summary"] for row in kept]
    direct = metrics.score_summaries(summaries, [row["abstract"] for row in kept])
    told = scored(run, capsys, "--reference-column", "abstract")
    assert (told["task"], told["reference_column"]) == ("summarize", "abstract")
    written = assert_scores(run, told, direct, [row["id"] for row in kept])
    assert written[rows[FAILED]["id"]]["prediction"] is None
    assert written[rows[0]["id"]]["reference"] == rows[0]["abstract"]
    assert written[rows[0]["id"]]["prediction"] == found[rows[0]["id"]]["summary"]
    # References of other files, by id, in another order and with one that nobody asked for.
    others = [{"key": row["id"], "right": row["abstract"]} for row in reversed(kept)]
    place = write_rows(tmp_path / "others.parquet", [*others, {"key": "else", "right": "x"}])
    words = ["--references", str(place), "--id-column", "key", "--reference-column", "right"]
    told = scored(run, capsys, *words)
    assert_scores(run, told, direct, [row["id"] for row in kept])
    # What there is no reference in is refused.
    for refused in (["--reference-column", "right"], [*words[:4], "--reference-column", "wrong"]):
        assert command(["evaluate", str(run), *refused]) == 2
    (run / "_SUCCESS").unlink()
    assert command(["evaluate", str(run), "--reference-column", "abstract"]) == 2
    assert command(["evaluate", str(tmp_path / "in"), "--reference-column", "abstract"]) == 2


def test_answers(
    finished: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = [" ".join(row["text"].split()[3:6]) for row in good_rows(NUM_ROWS)]
    squad = [
        {"text": [text] if i % 3 else [], "answer_start": [9]} for i, text in enumerate(golden)
    ]
    rows = rows_with("answers", squad, query=None)
    found = finished("answer", rows, keep_columns="answers")
    kept = [row for row in rows if row["answers"] is not None]
    told = scored(tmp_path / "run", capsys, "--reference-column", "answers")
    direct = metrics.score_answers(
        [found[row["id"]]["answer"] for row in kept], [row["answers"]["text"] for row in kept]
    )
    assert_scores(tmp_path / "run", told, direct, [row["id"] for row in kept])


@pytest.mark.parametrize("by_number", [True, False])
def test_classes(
    by_number: bool,
    finished: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbers = [i % len(LABELS) for i in range(NUM_ROWS)]
    given: list[Any] = numbers if by_number else [LABELS[i] for i in numbers]
    rows = rows_with("color", given, text=" ")
    found = finished("classify", rows, keep_columns="color")
    kept = [
        (row["id"], LABELS[i])
        for i, row in zip(numbers, rows, strict=True)
        if row["color"] is not None
    ]
    told = scored(tmp_path / "run", capsys, "--reference-column", "color")
    direct = metrics.score_classes([found[name]["label"] for name, _ in kept], [c for _, c in kept])
    assert_scores(tmp_path / "run", told, direct, [name for name, _ in kept])


def test_tags_of_words(
    finished: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [row["text"].split() for row in good_rows(NUM_ROWS)]
    tags = [["B-PER", "I-PER", "O", "B-LOC"] * (len(w) // 4) + ["O"] * (len(w) % 4) for w in words]
    rows = rows_with("tags", tags)
    for row, own in zip(rows, words, strict=True):
        row["tokens"] = own
    rows[FAILED]["tokens"] = None
    found = finished("tag", rows, words_column="tokens", keep_columns="tags,tokens")
    predictions, references, ids = [], [], []
    for row in rows:
        if row["tags"] is None:
            continue
        ids.append(row["id"])
        entities = found[row["id"]]["entities"]
        told = entities and [(e["label"], e["start"], e["end"]) for e in entities]
        predictions.append(told)
        own = row["tokens"] or [""] * len(row["tags"])
        starts = [sum(len(word) + 1 for word in own[:i]) for i in range(len(own) + 1)]
        spans = metrics.spans_of_tags(row["tags"])
        references.append([(label, starts[a], starts[b] - 1) for label, a, b in spans])
    assert references[0], "nothing is expected: nothing would be compared"
    direct = metrics.score_spans(predictions, references)
    result = scored(tmp_path / "run", capsys, "--reference-column", "tags")
    assert_scores(tmp_path / "run", result, direct, ids)
    assert result["scores"]["recall"] < 1


def test_choices(
    finished: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_with("right", [i % 4 for i in range(NUM_ROWS)], choices=None)
    found = finished("choose", rows, keep_columns="right")
    kept = [row for row in rows if row["right"] is not None]
    told = scored(tmp_path / "run", capsys, "--reference-column", "right")
    direct = metrics.score_choices(
        [found[row["id"]]["choice"] for row in kept], [row["right"] for row in kept]
    )
    assert_scores(tmp_path / "run", told, direct, [row["id"] for row in kept])


def test_fills(
    finished: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = good_rows(NUM_ROWS)
    masked = [
        [o for o, c in zip(r["text"].split(), r["cloze"].split(), strict=True) if c == "<mask>"]
        for r in rows
    ]
    rows = rows_with("hidden", masked, cloze=None)
    found = finished("fill", rows, keep_columns="hidden", top_k=2000)
    predictions, references = [], []
    for row in rows:
        for place, token in enumerate(row["hidden"] or ()):
            fills = found[row["id"]]["fills"]
            tokens = fills and [each["token"].strip() for each in fills[place]]
            # The same word with a space and without: the better place counts.
            predictions.append(tokens and list(dict.fromkeys(tokens)))
            references.append(token)
    ranked = [each["token"].strip() for each in found[rows[0]["id"]]["fills"][0]]
    assert len(set(ranked)) < len(ranked)
    direct = metrics.score_rankings(predictions, references)
    told = scored(tmp_path / "run", capsys, "--reference-column", "hidden")
    assert told["scores"] == pytest.approx(direct.summary)
    written = {
        r["id"]: r for r in pq.read_table(tmp_path / "run" / "evaluation.parquet").to_pylist()
    }
    own = direct.per_row[: len(masked[0])]
    assert written[rows[0]["id"]]["mrr"] == pytest.approx(sum(s["mrr"] for s in own) / len(own))


def test_embeddings(
    finished: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row without a reference is a right answer of others: it is ranked with the rest."""
    bare = good_rows(NUM_ROWS)[BARE]["id"]
    rows = rows_with("near", [[bare] for _ in range(NUM_ROWS)], text="")
    found = finished("embed", rows, keep_columns="near")
    ids = list(found)
    vectors = [found[name]["embedding"] for name in ids]
    ranking = metrics.rank_documents(vectors, vectors)
    nearest = {
        name: each and [ids[i] for i in each if ids[i] != name]
        for name, each in zip(ids, ranking, strict=True)
    }
    kept = [row["id"] for row in rows if row["near"] is not None]
    direct = metrics.score_rankings([nearest[name] for name in kept], [[bare]] * len(kept))
    told = scored(tmp_path / "run", capsys, "--reference-column", "near")
    written = assert_scores(tmp_path / "run", told, direct, kept)
    assert told["scores"]["mrr"] > 0.1
    assert json.loads(written[kept[0]]["prediction"]) == nearest[kept[0]]
