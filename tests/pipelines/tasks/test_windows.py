"""The results of a document's windows become the document's: each merge against its definition."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longformer_core.encoding.request import Encoding
from pipelines.errors import Refused
from pipelines.tasks.answer import Answer, AnswerOptions, best_spans
from pipelines.tasks.base import Document, Output, Task
from pipelines.tasks.classify import Classify, ClassifyOptions
from pipelines.tasks.embed import Embed, EmbedOptions
from pipelines.tasks.encoding import mean_by_tokens, owners, softmax, token_values
from pipelines.tasks.fill import Fill, FillOptions
from pipelines.tasks.preparation import Frame, Window, documents_of, spans
from pipelines.tasks.tag import Tag, TagOptions
from tests.helpers import corpus_texts
from tests.pipelines.tasks.heads import answers, make_head
from tests.pipelines.tasks.test_heads_against_transformers import TAGS

FRAME = Frame(before=(0, 9, 2), after=(2,))
# What makes characters and tokens differ.
STRANGE = "👩‍👩‍👧 e\u0301e\u0301 \r\n 語\u200b "


@st.composite
def cuts(draw: Any) -> tuple[list[Window], int]:
    """Windows of a document, and its tokens."""
    num_tokens = draw(st.integers(1, 60))
    room = draw(st.integers(1, 20))
    stride = draw(st.integers(0, room - 1))
    ids = np.arange(100, 100 + num_tokens, dtype=np.int32)
    found = [Window.of(ids, FRAME, *piece) for piece in spans(num_tokens, room, stride)]
    return found, num_tokens


def asked(task: Task, document: Document, results: list[Encoding]) -> Output:
    """What a task makes of these results of a document's windows."""
    process = task.process(document)
    assert len(next(process)) == len(results)
    with pytest.raises(StopIteration) as end:
        process.send(results)
    output: Output = end.value.value
    return output


@settings(max_examples=60, deadline=None)
@given(cut=cuts())
def test_a_token_belongs_to_the_window_with_most_context(cut: tuple[list[Window], int]) -> None:
    windows, num_tokens = cut
    owner = owners(windows, num_tokens)
    for token in range(num_tokens):
        contexts = []
        for window in windows:
            place = token - window.start
            if not 0 <= place < window.size:
                contexts.append(-1.0)
                continue
            left = place if window.start > 0 else float("inf")
            ends_there = window.start + window.size == num_tokens
            right = float("inf") if ends_there else window.size - 1 - place
            contexts.append(float(min(left, right)))
        assert owner[token] == contexts.index(max(contexts))
    # What a token's value is, with values that tell window and slot.
    values = [
        np.array([[1000.0 * number + slot] for slot in range(len(window.input_ids))])
        for number, window in enumerate(windows)
    ]
    found = token_values(Document("x", windows), values, num_tokens)
    for token in range(num_tokens):
        number = owner[token]
        slot = token - windows[number].start + windows[number].first
        assert windows[number].input_ids[slot] == 100 + token
        assert found[token, 0] == 1000.0 * number + slot


@settings(max_examples=60, deadline=None)
@given(cut=cuts(), seed=st.integers(0, 99))
def test_means_weigh_windows_by_their_tokens(cut: tuple[list[Window], int], seed: int) -> None:
    windows, _ = cut
    values = list(np.random.default_rng(seed).normal(size=(len(windows), 3)))
    total = sum(window.size for window in windows)
    expected = sum(w.size * v for w, v in zip(windows, values, strict=True)) / total
    assert mean_by_tokens(values, windows) == pytest.approx(expected)


@settings(max_examples=80, deadline=None)
@given(
    cut=cuts(),
    seed=st.integers(0, 999),
    longest=st.integers(1, 8),
    count=st.integers(1, 4),
    ties=st.booleans(),
)
def test_the_best_spans_of_a_window(
    cut: tuple[list[Window], int], seed: int, longest: int, count: int, ties: bool
) -> None:
    window = cut[0][seed % len(cut[0])]
    draw = np.random.default_rng(seed)
    length = len(window.input_ids)
    start, end = draw.normal(size=(2, length)) * 3
    if ties:
        start, end = start.round(), end.round()
    found, nothing = best_spans(start, end, window, longest, count)
    keep = [0, *range(window.first, window.first + window.size)]
    p, q = softmax(start[keep]), softmax(end[keep])
    assert nothing == pytest.approx(p[0] * q[0])
    every = [
        (-p[1 + i] * q[1 + j], window.start + i, window.start + j)
        for i in range(window.size)
        for j in range(i, min(window.size, i + longest))
    ]
    assert [(-score, first, last) for score, first, last in found] == sorted(every)[:count]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory for each head, by a draw that does not call everything by one label."""
    folder = tmp_path_factory.mktemp("heads")
    made = {
        "LongformerForQuestionAnswering": None,
        "LongformerForTokenClassification": TAGS,
        "LongformerForSequenceClassification": ["cold", "warm", "hot"],
        "LongformerModel": None,
    }
    for name, labels in made.items():
        make_head(folder / name, name, labels=labels, seed=7)
    return {name: folder / name for name in made}


def windowed(num_windows: int, words: list[str]) -> str:
    """A text of so many windows of 64 tokens, at least; every word is a token or more."""
    return " ".join((words * (num_windows * 64 // len(words) + 1))[: num_windows * 62])


@settings(max_examples=12, deadline=None)
@given(num_windows=st.integers(1, 12), place=st.floats(0, 1), is_strange=st.booleans())
def test_a_planted_answer_is_found_with_its_characters(
    heads: dict[str, Path], num_windows: int, place: float, is_strange: bool
) -> None:
    options = AnswerOptions(
        model=str(heads["LongformerForQuestionAnswering"]), on_long="windows", window_tokens=96
    )
    task = Answer.from_options(options, device="cpu")
    words = windowed(num_windows, ["the", "house", "is", "old"]).split()
    words.insert(int(place * len(words)), "Zanzibar")
    text = (STRANGE if is_strange else "") + " ".join(words)
    document = one(task, text=[text], question=["Where is it?"])
    planted = token_places(document, text, "Zanzibar")
    results = []
    for window in document.windows:
        start, end = np.zeros((2, len(window.input_ids)), np.float32)
        for token, logits in ((planted[0], start), (planted[-1], end)):
            if window.start <= token < window.start + window.size:
                logits[token - window.start + window.first] = 9.0
        results.append(Encoding(start_logits=torch.tensor(start), end_logits=torch.tensor(end)))
    found = asked(task, document, results).columns
    begin = text.index("Zanzibar")
    assert (found["answer"], found["start"], found["end"]) == ("Zanzibar", begin, begin + 8)


@settings(max_examples=12, deadline=None)
@given(num_windows=st.integers(1, 12), place=st.floats(0, 1), is_strange=st.booleans())
def test_a_planted_entity_is_found_with_its_characters(
    heads: dict[str, Path], num_windows: int, place: float, is_strange: bool
) -> None:
    options = TagOptions(
        model=str(heads["LongformerForTokenClassification"]), on_long="windows", window_tokens=64
    )
    task = Tag.from_options(options, device="cpu")
    words = windowed(num_windows, ["the", "house", "is", "old"]).split()
    words.insert(int(place * len(words)), "Zanzibar")
    text = (STRANGE if is_strange else "") + " ".join(words)
    document = one(task, text=[text])
    planted = token_places(document, text, "Zanzibar")
    results = []
    for window in document.windows:
        logits = np.zeros((len(window.input_ids), len(TAGS)), np.float32)
        logits[:, 0] = 5.0
        for token in planted:
            if window.start <= token < window.start + window.size:
                logits[token - window.start + window.first, TAGS.index("B-LOC")] = 9.0
        results.append(Encoding(logits=torch.tensor(logits)))
    entities = asked(task, document, results).columns["entities"]
    begin = text.index("Zanzibar")
    covered = [c for e in entities for c in range(e["start"], e["end"])]
    assert covered == list(range(begin, begin + 8))
    assert {e["label"] for e in entities} == {"LOC"}
    assert all(e["text"] == text[e["start"] : e["end"]] for e in entities)


def test_a_planted_class_wins_by_the_largest_logit(heads: dict[str, Path]) -> None:
    for num_windows in (1, 5, 12):
        for merge, expected in (("max", "hot"), ("mean", "cold" if num_windows > 5 else "hot")):
            options = ClassifyOptions(
                model=str(heads["LongformerForSequenceClassification"]),
                on_long="windows", window_tokens=64, merge=merge,
            )  # fmt: skip
            task = Classify.from_options(options, device="cpu")
            document = one(task, text=[windowed(num_windows, ["a"])])
            logits = [[1.0, 0.0, 0.0] for _ in document.windows]
            logits[-1] = [0.0, 0.0, 6.0]
            results = [Encoding(logits=torch.tensor(each)) for each in logits]
            label = asked(task, document, results).columns["label"]
            assert label == expected, (num_windows, merge)


@pytest.mark.parametrize("name", ["answer", "tag", "classify", "embed"])
def test_a_document_of_one_window_gives_the_row_of_the_whole(
    heads: dict[str, Path], name: str
) -> None:
    texts = [windowed(2, ["one", "old", "house"]), STRANGE + "and some words"]
    columns: dict[str, Any] = {"text": texts}
    kinds: dict[str, tuple[Any, Any, str]] = {
        "answer": (Answer, AnswerOptions, "LongformerForQuestionAnswering"),
        "tag": (Tag, TagOptions, "LongformerForTokenClassification"),
        "classify": (Classify, ClassifyOptions, "LongformerForSequenceClassification"),
        "embed": (Embed, EmbedOptions, "LongformerModel"),
    }
    task, options, head = kinds[name]
    if name == "answer":
        columns["question"] = ["Which one?", "What?"]
    whole = answers(task.from_options(options(model=str(heads[head])), device="cpu"), **columns)
    cut = options(model=str(heads[head]), on_long="windows", window_tokens=512)
    rows = answers(task.from_options(cut, device="cpu"), **columns)
    for row, expected in zip(rows, whole, strict=True):
        assert row["num_windows"] == 1
        assert row.keys() == expected.keys()
        for key, value in row.items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(value, expected[key])
            else:
                assert value == expected[key], key


def one(task: Task, **columns: Any) -> Document:
    """The only document of these columns, prepared."""
    import pyarrow as pa

    from pipelines.tasks.preparation import documents_of

    block = pa.table(
        {f"__{role}": pa.array(values, pa.large_string()) for role, values in columns.items()}
    )
    (document,) = documents_of(task.prepare(block), ["only"], [0])
    return document


def token_places(document: Document, text: str, word: str) -> list[int]:
    """The document's tokens that lie in a word of its text."""
    assert document.offsets is not None
    begin = text.index(word)
    return [
        token
        for token, (start, end) in enumerate(document.offsets)
        if begin <= start and end <= begin + len(word) and start < end
    ]


@pytest.mark.parametrize(("on_long", "is_end"), [("truncate", False), ("truncate_left", True)])
def test_a_cut_document_is_tagged_as_what_is_left_of_it(
    heads: dict[str, Path], on_long: str, is_end: bool
) -> None:
    model = str(heads["LongformerForTokenClassification"])
    num_entities = 0
    for aggregation, text in itertools.product(("simple", "first"), corpus_texts(6, 300)):
        options: dict[str, Any] = {"model": model, "aggregation": aggregation}
        cut = TagOptions(**options, on_long=on_long, max_source_tokens=40)
        task = Tag.from_options(cut, device="cpu")
        block = task.prepare(pa.table({"__text": pa.array([text], pa.large_string())}))
        (document,) = documents_of(block, ["a"], [0])
        (window,) = document.windows
        assert window.size == 38
        assert document.offsets is not None
        own = document.offsets[window.start : window.start + window.size]
        begin, end = (int(own[0, 0]), int(own[-1, 1]))
        # The space before a word is part of its token.
        begin -= is_end and text[begin - 1] == " "
        (found,) = answers(task, text=[text])
        (left,) = answers(
            Tag.from_options(TagOptions(**options), device="cpu"), text=[text[begin:end]]
        )
        num_entities += len(found["entities"])
        assert [(e["text"], e["start"], e["label"]) for e in found["entities"]] == [
            (e["text"], e["start"] + begin, e["label"]) for e in left["entities"]
        ]
        assert found["coverage"] == 38 / len(document.offsets)
    assert num_entities


def test_fill_among_targets(tmp_path: Path) -> None:
    make_head(tmp_path, "LongformerForMaskedLM")
    texts = ["The <mask> of a <mask>."]
    every = Fill.from_options(FillOptions(model=str(tmp_path), top_k=50_000), device="cpu")
    targets = (" the", " of", "ing")
    some = Fill.from_options(FillOptions(model=str(tmp_path), targets=targets), device="cpu")
    (all_of,), (few,) = answers(every, text=texts), answers(some, text=texts)
    for mine, theirs in zip(few["fills"], all_of["fills"], strict=True):
        assert mine == [each for each in theirs if each["token"] in targets]
        assert len(mine) == 3
    with pytest.raises(Refused, match="unheard of"):
        Fill.from_options(
            FillOptions(model=str(tmp_path), targets=(" the", "unheard of")), device="cpu"
        )
