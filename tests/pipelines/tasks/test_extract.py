"""Key sentences: exact places, in order, and found wherever in a document they stand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from longformer_core.encoding.request import Encoding
from pipelines.batch.worker import Worker
from pipelines.errors import Refused
from pipelines.tasks.extract import ExtractiveSummarize, choose
from pipelines.tasks.preparation import documents_of, tokenizer_of
from pipelines.tasks.summarize import Summarize, SummarizeOptions
from tests.helpers import corpus_texts
from tests.pipelines.asking import outputs
from tests.pipelines.tasks.heads import make_head

QUERY = "Penguins in Antarctica swallow small fish and krill under the ice."


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    # With narrow weights, and places that say nothing, a state says most of its own word.
    model = make_head(path, "LongformerForMaskedLM", initializer_range=0.05)
    with torch.no_grad():
        model.longformer.embeddings.position_embeddings.weight.zero_()
    model.save_pretrained(path)
    return path


def task_of(directory: Path, **options: Any) -> ExtractiveSummarize:
    task = Summarize.from_options(SummarizeOptions(model=str(directory), **options), device="cpu")
    assert isinstance(task, ExtractiveSummarize)
    return task


def rows(task: ExtractiveSummarize, **columns: list[str]) -> list[dict[str, Any]]:
    """Return the columns of every row, and how many windows were read."""
    arrays = {f"__{role}": pa.array(each, pa.large_string()) for role, each in columns.items()}
    block = task.prepare(pa.table(arrays))
    assert block["error"].null_count == block.num_rows
    assert set(block["coverage"].to_pylist()) == {1.0}
    names = [str(i) for i in range(block.num_rows)]
    found = outputs(Worker(task, "cpu", 2, 0.3), documents_of(block, names, range(block.num_rows)))
    for each in found.values():
        assert each.error is None
    counts = block["num_windows"].to_pylist()
    return [{**found[n].columns, "num_windows": c} for n, c in zip(names, counts, strict=True)]


def test_offsets_are_exact_and_in_order(directory: Path) -> None:
    odd = (
        "A \U0001f600 smiles at e\u0301 in the cafe\u0301 today.\r\n"
        "The \U0001f468\u200d\U0001f469\u200d\U0001f467 family walks along the river.\r\n\r\n"
    )
    long = odd * 3 + corpus_texts(1)[0][:6000] + odd
    texts = [long, odd, "Heading\n\nx = 1", "\U0001f600 \u0301"]
    task = task_of(directory, num_sentences=4, window_tokens=200)
    for text, row in zip(texts, rows(task, text=texts), strict=True):
        found = row["sentences"]
        assert 1 <= len(found) <= 4
        assert [text[each["start"] : each["end"]] for each in found] == [e["text"] for e in found]
        places = [each["start"] for each in found]
        assert places == sorted(set(places))
        assert row["summary"] == " ".join(" ".join(each["text"].split()) for each in found)
        assert pa.array([found], task.columns.field("sentences").type).to_pylist() == [found]


@pytest.mark.parametrize("by_column", [False, True])
def test_a_query_is_found_in_any_window(directory: Path, by_column: bool) -> None:
    """With states that say which sentence is the query, wherever it stands."""
    asked: Any = {"query_column": "what"} if by_column else {"query": QUERY}
    task = task_of(directory, num_sentences=1, window_tokens=160, **asked)
    assert [each.role for each in task.inputs] == ["text", "query"][: 1 + by_column]
    words = set(tokenizer_of(task.model).encode(QUERY)[2:-2])
    counts = []
    for size in (3, 30, 110):
        for at in (0, size // 3, size - 1, size):
            filler = ["The house is old and the road is long." for _ in range(size)]
            text = " ".join([*filler[:at], QUERY, *filler[at:]])
            columns = {"__text": [text]} | ({"__query": [QUERY]} if by_column else {})
            block = task.prepare(pa.table(columns))
            (document,) = documents_of(block, ["only"], [0])
            process = task.process(document)
            results = []
            for request in next(process):
                held = [set(request.input_ids[a:b].tolist()) for a, b in request.spans]
                means = [[1.0, 0.0] if len(words & each) > 5 else [0.0, 1.0] for each in held]
                states = torch.tensor(means) if means else None
                results.append(Encoding(mean=torch.tensor([1.0, 0.0]), span_means=states))
            with pytest.raises(StopIteration) as end:
                process.send(results)
            assert end.value.value.columns["summary"] == QUERY
            counts.append(block["num_windows"][0].as_py())
    assert counts[0] == 1
    assert counts[-1] >= 5


def test_of_sentences_that_say_the_same_one_is_taken() -> None:
    vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.7, 0.714], [0.0, 1.0]])
    nearest_to_the_first_two = np.array([1.0, 0.41])
    assert [place for place, _ in choose(vectors, 2, nearest_to_the_first_two)] == [0, 2]
    assert [place for place, _ in choose(vectors, 9)] == [0, 1, 2, 3]
    assert [place for place, _ in choose(vectors, 1, np.array([0.0, 1.0]))] == [3]


def test_options_of_the_other_kind_are_refused_by_name(
    directory: Path, led_directory: Path
) -> None:
    for given, names in [
        ({"num_beams": 2, "keep_levels": True}, ("--num-beams", "--keep-levels")),
        ({"query": "a", "query_column": "b"}, ("--query and --query-column",)),
        ({"query": " "}, ("--query",)),
        ({"on_long": "error"}, ("--on-long",)),
        ({"max_source_tokens": 9}, ("--max-source-tokens",)),
    ]:
        with pytest.raises(Refused) as caught:
            task_of(directory, **given)
        assert all(name in str(caught.value) for name in names)
    with pytest.raises(Refused, match="--num-sentences"):
        Summarize.from_options(
            SummarizeOptions(model=str(led_directory), num_sentences=3), device="cpu"
        )


def test_a_plan_says_which_kind(directory: Path, led_directory: Path) -> None:
    assert task_of(directory).describe()["summary"].startswith("extractive: 5 sentences")
    assert "likeness to 'x'" in task_of(directory, query="x").describe()["summary"]
    led = Summarize.from_options(SummarizeOptions(model=str(led_directory)), device="cpu")
    assert isinstance(led, Summarize)
    assert led.describe()["summary"] == "abstractive"
    assert json.dumps(task_of(directory).fingerprint()) != json.dumps(
        task_of(directory, num_sentences=6).fingerprint()
    )
