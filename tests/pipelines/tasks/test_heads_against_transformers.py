"""Every task of an encoder says what the published model says of the same ids.

Seeded models with wide weights: first each test sees that the oracle tells documents apart.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipelines.tasks.answer import Answer, AnswerOptions
from pipelines.tasks.choose import Choose, ChooseOptions
from pipelines.tasks.classify import Classify, ClassifyOptions
from pipelines.tasks.embed import Embed, EmbedOptions
from pipelines.tasks.fill import Fill, FillOptions
from pipelines.tasks.tag import Tag, TagOptions
from tests.pipelines.tasks.heads import answers, corpus, make_head, tokenizer_of

LIMIT = 512
NUM_ROWS = 16
TOLERANCE = 1e-4
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


def encoded(tokenizer: Any, *texts: Any) -> Any:
    return tokenizer(
        *texts, max_length=LIMIT, truncation="only_first" if len(texts) < 2 else True,
        return_tensors="pt", return_offsets_mapping=True,
    )  # fmt: skip


def first_global(ids: torch.Tensor) -> torch.Tensor:
    marks = torch.zeros_like(ids)
    marks[:, 0] = 1
    return marks


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression", "one"])
def test_classify(tmp_path: Path, problem: str) -> None:
    labels = ["only"] if problem in ("regression", "one") else ["red", "green", "blue", "black"]
    kind = {
        "single_label": None,
        "multi_label": "multi_label_classification",
        "regression": "regression",
        "one": None,
    }[problem]
    name = "LongformerForSequenceClassification"
    model = make_head(tmp_path, name, labels=labels, problem_type=kind, seed=8)
    tokenizer = tokenizer_of(tmp_path)
    texts = [row["text"] for row in corpus("kep_sig", NUM_ROWS, ["text"])]
    with torch.no_grad():
        logits = []
        for text in texts:
            ids = encoded(tokenizer, text)["input_ids"]
            logits.append(model(ids, global_attention_mask=first_global(ids)).logits[0].numpy())
    assert np.std(logits, axis=0).min() > 0.01
    options = ClassifyOptions(model=str(tmp_path), max_source_tokens=LIMIT)
    rows = answers(Classify.from_options(options, device="cpu"), text=texts)
    for row, values in zip(rows, logits, strict=True):
        if problem == "single_label":
            scores = np.exp(values) / np.exp(values).sum()
        else:
            scores = values if problem == "regression" else 1 / (1 + np.exp(-values))
        assert row["label"] == labels[int(values.argmax())]
        assert row["score"] == pytest.approx(scores.max(), abs=TOLERANCE)
        told = {each["label"]: each["score"] for each in row["scores"]}
        assert [told[label] for label in labels] == pytest.approx(list(scores), abs=TOLERANCE)
        ranked = [each["score"] for each in row["scores"]]
        assert ranked == sorted(ranked, reverse=True)
    if len(labels) > 1:
        assert len({row["label"] for row in rows}) > 1


@pytest.mark.parametrize("name", ["LongformerForQuestionAnswering", "LEDForQuestionAnswering"])
def test_answer(tmp_path: Path, name: str) -> None:
    model = make_head(tmp_path, name)
    tokenizer = tokenizer_of(tmp_path)
    given = corpus("cuad_qa", NUM_ROWS, ["question", "text"])
    options = AnswerOptions(model=str(tmp_path), max_source_tokens=LIMIT, max_answer_tokens=12)
    rows = answers(
        Answer.from_options(options, device="cpu"),
        question=[row["question"] for row in given],
        text=[row["text"] for row in given],
    )
    spans = set()
    for row, asked in zip(rows, given, strict=True):
        inputs = tokenizer(
            asked["question"], asked["text"], max_length=LIMIT, truncation="only_second",
            return_tensors="pt", return_offsets_mapping=True,
        )  # fmt: skip
        ids = inputs["input_ids"]
        marks = torch.zeros_like(ids)
        marks[:, : int((ids[0] == tokenizer.sep_token_id).nonzero()[0])] = 1
        with torch.no_grad():
            out = model(ids, global_attention_mask=marks)
        mine = [i for i, part in enumerate(inputs.sequence_ids(0)) if part == 1]
        keep = [0, *mine]
        start = torch.softmax(out.start_logits[0, keep].double(), 0)[1:].numpy()
        end = torch.softmax(out.end_logits[0, keep].double(), 0)[1:].numpy()
        scores = np.triu(np.outer(start, end))
        scores -= np.triu(scores, options.max_answer_tokens)
        first, last = np.unravel_index(scores.argmax(), scores.shape)
        offsets = inputs["offset_mapping"][0]
        begin, stop = int(offsets[mine[first]][0]), int(offsets[mine[last]][1])
        assert (row["start"], row["end"]) == (begin, stop)
        assert row["answer"] == asked["text"][begin:stop]
        assert row["score"] == pytest.approx(scores.max(), abs=TOLERANCE)
        spans.add((begin, stop))
    assert len(spans) > NUM_ROWS // 2


@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
def test_tag_is_the_token_classification_pipeline(tmp_path: Path, aggregation: Any) -> None:
    make_head(tmp_path, "LongformerForTokenClassification", labels=TAGS)
    tokenizer = tokenizer_of(tmp_path)
    pipeline = transformers.pipeline(
        "token-classification",
        model=str(tmp_path),
        tokenizer=tokenizer,
        aggregation_strategy=aggregation,
    )
    # So short that the pipeline, which cuts nothing here, reads them whole.
    texts = []
    for row in corpus("litbank_ner", 8, ["text"]):
        text = " ".join(row["text"].split()[:250])
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        texts.append(text[: read.offset_mapping[:900][-1][1]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says of itself that it guesses where words begin
        theirs = [pipeline(text) for text in texts]
    options = TagOptions(model=str(tmp_path), aggregation=aggregation)
    rows = answers(Tag.from_options(options, device="cpu"), text=texts)
    key = "entity" if aggregation == "none" else "entity_group"
    for row, oracle, text in zip(rows, theirs, texts, strict=True):
        assert [(e["label"], e["start"], e["end"]) for e in row["entities"]] == [
            (e[key], e["start"], e["end"]) for e in oracle
        ]
        scores = [e["score"] for e in row["entities"]]
        assert scores == pytest.approx([float(e["score"]) for e in oracle], abs=TOLERANCE)
        assert all(e["text"] == text[e["start"] : e["end"]] for e in row["entities"])
    assert len({len(row["entities"]) for row in rows}) > 1


def test_tag_takes_lists_of_words(tmp_path: Path) -> None:
    make_head(tmp_path, "LongformerForTokenClassification", labels=TAGS)
    words = [text["text"].split()[:60] for text in corpus("litbank_ner", 3, ["text"])]
    whole = TagOptions(model=str(tmp_path))
    listed = TagOptions(model=str(tmp_path), words_column="tokens")
    by_text = answers(
        Tag.from_options(whole, device="cpu"), text=[" ".join(each) for each in words]
    )
    assert answers(Tag.from_options(listed, device="cpu"), text=words) == by_text


@pytest.mark.parametrize("has_question", [True, False])
def test_choose(tmp_path: Path, has_question: bool) -> None:
    model = make_head(tmp_path, "LongformerForMultipleChoice")
    tokenizer = tokenizer_of(tmp_path)
    given = corpus("qmsum_mc", NUM_ROWS, ["text", "question", "choices"])
    options = ChooseOptions(
        model=str(tmp_path), max_source_tokens=LIMIT,
        question_column="question" if has_question else None,
    )  # fmt: skip
    task = Choose.from_options(options, device="cpu")
    rows = answers(task, **{c: [row[c] for row in given] for c in ("text", "question", "choices")})
    chosen = set()
    for row, asked in zip(rows, given, strict=True):
        logits, lengths = [], []
        seconds = [f"{asked['question']} {c}" if has_question else c for c in asked["choices"]]
        room = max(len(tokenizer(s)["input_ids"]) - 2 for s in seconds)
        ids_of_text = tokenizer(asked["text"], add_special_tokens=False)["input_ids"]
        kept = ids_of_text[: LIMIT - 4 - room]
        for second in seconds:
            tail = tokenizer(second, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[0, *kept, 2, 2, *tail, 2]])
            marks = torch.zeros_like(ids)
            marks[:, len(kept) + 3 :] = 1
            with torch.no_grad():
                out = model(ids[:, None], global_attention_mask=marks[:, None])
            logits.append(float(out.logits[0, 0]))
            lengths.append(ids.shape[1])
        expected = torch.softmax(torch.tensor(logits).double(), 0).tolist()
        assert row["choice"] == int(np.argmax(logits))
        assert row["scores"] == pytest.approx(expected, abs=TOLERANCE)
        assert row["num_tokens_in"] == len(ids_of_text) + room + 4
        chosen.add(row["choice"])
    assert len(chosen) > 1


def test_fill_is_the_fill_mask_pipeline(tmp_path: Path) -> None:
    make_head(tmp_path, "LongformerForMaskedLM")
    tokenizer = tokenizer_of(tmp_path)
    pipeline = transformers.pipeline("fill-mask", model=str(tmp_path), tokenizer=tokenizer, top_k=4)
    texts = []
    for number, row in enumerate(corpus("proposals", 8, ["text"])):
        words = row["text"].split()[:200]
        for place in range(20, 60, 40 // (1 + number % 2)):
            words[place] = "<mask>"
        texts.append(" ".join(words))
    texts.append("nothing is hidden here")
    options = FillOptions(model=str(tmp_path), top_k=4)
    rows = answers(Fill.from_options(options, device="cpu"), text=texts)
    assert rows[-1]["fills"] == []
    firsts = set()
    for row, text in zip(rows[:-1], texts[:-1], strict=True):
        oracle = pipeline(text)
        oracle = oracle if isinstance(oracle[0], list) else [oracle]
        assert len(row["fills"]) == len(oracle) == text.count("<mask>")
        for mine, theirs in zip(row["fills"], oracle, strict=True):
            assert [each["token"] for each in mine] == [each["token_str"] for each in theirs]
            scores = [each["score"] for each in theirs]
            assert [each["score"] for each in mine] == pytest.approx(scores, abs=TOLERANCE)
            firsts.add(mine[0]["token"])
    assert len(firsts) > 1


@pytest.mark.parametrize("pooling", ["mean", "first", "pooler"])
@pytest.mark.parametrize("name", ["LongformerModel", "LongformerForMaskedLM", "LEDModel"])
def test_embed(tmp_path: Path, name: str, pooling: Any) -> None:
    if pooling == "pooler" and name != "LongformerModel":
        name = "LongformerModel"
    model = make_head(tmp_path, name)
    base = getattr(model, "longformer", model)
    if name == "LEDModel":
        base = model.encoder
    tokenizer = tokenizer_of(tmp_path)
    texts = [row["text"] for row in corpus("proposals", NUM_ROWS, ["text"])]
    options = EmbedOptions(
        model=str(tmp_path), max_source_tokens=LIMIT, pooling=pooling, normalize=True
    )
    rows = answers(Embed.from_options(options, device="cpu"), text=texts)
    vectors = []
    for row, text in zip(rows, texts, strict=True):
        with torch.no_grad():
            out = base(encoded(tokenizer, text)["input_ids"])
        states = out.last_hidden_state[0]
        vector = {"mean": states.mean(0), "first": states[0]}.get(pooling)
        vector = out.pooler_output[0] if vector is None else vector
        expected = (vector / vector.norm()).numpy()
        assert np.abs(row["embedding"] - expected).max() < TOLERANCE
        vectors.append(row["embedding"])
    assert np.std(vectors, axis=0).max() > 0.01
