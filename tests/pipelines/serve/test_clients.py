"""Unmodified clients against a server on the loopback: every value is the batch job's."""

from collections.abc import Callable
from typing import Any

import huggingface_hub.constants
import numpy as np
import openai
import pytest
from huggingface_hub import InferenceClient

from tests.pipelines.every_task import CASES, assert_same, good_rows, make_task
from tests.pipelines.serve.serving import Server
from tests.pipelines.tasks.heads import answers

ROWS = good_rows(6)
LONG = good_rows(2, 400)


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests keep the client from the hub; the loopback it may ask."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def batch_rows(server: Server, rows: list[dict[str, Any]] = ROWS, **options: Any) -> list[Any]:
    """What the batch job writes of rows with this server's model and options."""
    case = CASES[server.task.name]
    given = server.task.options.model_dump(exclude={"model"}, exclude_unset=True) | options
    task = make_task(case, server.task.options.model, **given)
    return answers(task, **{role: [row[c] for row in rows] for role, c in case.columns.items()})


def hub(server: Server) -> InferenceClient:
    return InferenceClient(server.url, timeout=60)


def openai_client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0)


# --- Hugging Face ---


def test_summarization(server_of: Callable[[str], Server]) -> None:
    server = server_of("summarize")
    found = [hub(server).summarization(row["text"]) for row in ROWS]
    expected = batch_rows(server)
    assert [each.summary_text for each in found] == [row["summary"] for row in expected]
    assert len({each.summary_text for each in found}) > 3
    for each, row in zip(found, expected, strict=True):
        usage: Any = each["usage"]
        assert usage == {
            "tokens_in": row["num_tokens_in"],
            "tokens_out": usage["tokens_out"],
            "windows": 1,
            "truncated": False,
            "coverage": 1.0,
        }
        assert 0 < usage["tokens_out"] <= 8


def test_summarization_with_options(server_of: Callable[[str], Server]) -> None:
    server = server_of("summarize")
    text = ROWS[0]["text"]
    given = {"num_beams": 1, "max_new_tokens": 12, "no_repeat_ngram_size": 2}
    found = hub(server).summarization(text, generate_parameters=given)
    (expected,) = batch_rows(server, ROWS[:1], **given)
    assert found.summary_text == expected["summary"]
    assert found.summary_text != hub(server).summarization(text).summary_text
    sampled = [
        hub(server)
        .summarization(text, generate_parameters={"do_sample": True, "seed": seed})
        .summary_text
        for seed in (1, 2, 1)
    ]
    assert sampled[0] == sampled[2] != sampled[1]


def test_text_classification(server_of: Callable[[str], Server]) -> None:
    server = server_of("classify")
    expected = batch_rows(server)
    for row, own in zip(ROWS, expected, strict=True):
        found = hub(server).text_classification(row["text"])
        assert_same([{"label": e.label, "score": e.score} for e in found], own["scores"])
    best = hub(server).text_classification(ROWS[0]["text"], top_k=1, function_to_apply="sigmoid")
    assert [each.label for each in best] == [expected[0]["label"]]
    raw = hub(server).text_classification(ROWS[0]["text"], function_to_apply="none")
    assert best[0].score == pytest.approx(1 / (1 + np.exp(-raw[0].score)))


def test_token_classification(server_of: Callable[[str], Server]) -> None:
    server = server_of("tag")
    for row, own in zip(ROWS, batch_rows(server), strict=True):
        found = hub(server).token_classification(row["text"])
        shaped = [
            {"label": e.entity_group, "score": e.score, "start": e.start, "end": e.end,
             "text": e.word} for e in found
        ]  # fmt: skip
        assert_same(shaped, own["entities"])
        assert found
    found = hub(server).token_classification(
        ROWS[0]["text"], aggregation_strategy="none", ignore_labels=["O", "MISC"]
    )
    (own,) = batch_rows(server, ROWS[:1], aggregation="none")
    expected = [e["label"] for e in own["entities"] if e["label"] != "MISC"]
    assert [each.entity for each in found] == expected


def test_question_answering(server_of: Callable[[str], Server]) -> None:
    server = server_of("answer")
    for row, own in zip(ROWS, batch_rows(server), strict=True):
        found: Any = hub(server).question_answering(question=row["query"], context=row["text"])
        shaped = {name: found[name] for name in ("answer", "score", "start", "end")}
        assert_same(shaped, {name: own[name] for name in shaped})
        assert row["text"][found.start : found.end] == found.answer
    several: Any = hub(server).question_answering(
        question=row["query"], context=row["text"], top_k=3, max_answer_len=4
    )
    (own,) = batch_rows(server, ROWS[-1:], top_k=3, max_answer_tokens=4)
    assert_same([dict(each) for each in several], own["answers"])
    assert len(several) == 3


def test_fill_mask(server_of: Callable[[str], Server]) -> None:
    server = server_of("fill")
    rows = [row | {"cloze": f"{row['text']} ends with <mask>."} for row in ROWS]
    for row, own in zip(rows, batch_rows(server, rows), strict=True):
        found = hub(server).fill_mask(row["cloze"])
        shaped = [{"token": e.token_str, "token_id": e.token, "score": e.score} for e in found]
        assert_same(shaped, own["fills"][0])
        assert found[0].sequence == row["cloze"].replace(
            " <mask>" if found[0].token_str.startswith(" ") else "<mask>", found[0].token_str
        )
    some = hub(server).fill_mask(rows[0]["cloze"], targets=[" the", " of"])
    assert {each.token_str for each in some} == {" the", " of"}
    body = {"inputs": ROWS[0]["cloze"]}
    several = server.post("/fill-mask", body).json()
    assert len(several) == ROWS[0]["cloze"].count("<mask>")


def test_feature_extraction(server_of: Callable[[str], Server]) -> None:
    server = server_of("embed")
    expected = np.stack([row["embedding"] for row in batch_rows(server)])
    texts = [row["text"] for row in ROWS]
    found = hub(server).feature_extraction(texts)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    (single,) = hub(server).feature_extraction(texts[0], normalize=True)
    np.testing.assert_allclose(single, expected[0] / np.linalg.norm(expected[0]), rtol=1e-4)
    similar = hub(server).sentence_similarity(texts[0], other_sentences=texts[1:])
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(similar, unit[1:] @ unit[0], rtol=1e-4)


def test_choices(server_of: Callable[[str], Server]) -> None:
    server = server_of("choose")
    for row, own in zip(ROWS, batch_rows(server), strict=True):
        given = {"prompt": row["text"], "choices": row["choices"], "question": row["query"]}
        found = server.post("/multiple-choice", {"inputs": given}).json()
        assert found[0]["index"] == own["choice"]
        scores = {each["index"]: each["score"] for each in found}
        assert_same([scores[i] for i in range(4)], own["scores"])
        assert found[0]["choice"] == row["choices"][own["choice"]]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("truncate", "on_long"),
    [("left", "truncate_left"), ("right", "truncate"), ("window", "windows")],
)
def test_long_documents_by_request(
    name: str, truncate: str, on_long: str, server_of: Callable[[str], Server]
) -> None:
    """The root of a server answers, long documents are cut as asked, and headers say it."""
    server = server_of(name)
    row = LONG[0] | {"cloze": LONG[0]["text"] + " <mask>"}
    (own,) = batch_rows(server, [row], on_long=on_long)
    inputs: Any = {
        "answer": {"question": row["query"], "context": row["text"]},
        "fill": row["cloze"],
        "choose": {"prompt": row["text"], "choices": row["choices"], "question": row["query"]},
    }.get(name, row["text"])
    refused = server.post("/", {"inputs": inputs})
    assert refused.status_code == 422
    assert refused.json()["error"]["type"] == "too_long"
    assert str(own["num_tokens_in"]) in refused.json()["error"]["message"]
    response = server.post("", {"inputs": inputs, "truncate": truncate})
    assert response.status_code == 200, response.text
    assert response.headers["x-longhaul-tokens"] == str(own["num_tokens_in"])
    assert response.headers["x-longhaul-truncated"] == str(own["truncated"]).lower()
    assert float(response.headers["x-longhaul-coverage"]) == pytest.approx(own["coverage"], 1e-4)
    assert response.headers["x-longhaul-windows"] == str(own["num_windows"])
    assert own["truncated"] == (truncate != "window")
    found = response.json()
    if name == "summarize":
        assert found[0]["summary_text"] == own["summary"]
    elif name == "embed":
        np.testing.assert_allclose(found[0], own["embedding"], rtol=1e-4, atol=1e-5)
    elif name == "classify":
        assert_same(found[0], own["scores"])
    elif name == "answer":
        assert_same(found, {key: own[key] for key in found})
    elif name == "tag":
        assert [e["word"] for e in found] == [e["text"] for e in own["entities"]]
    elif name == "fill":
        assert (truncate == "right") == (not own["fills"])
        if own["fills"]:
            assert [e["token"] for e in found] == [e["token_id"] for e in own["fills"][0]]
    else:
        assert found[0]["index"] == own["choice"]


# --- OpenAI ---


def test_openai_embeddings(server_of: Callable[[str], Server]) -> None:
    server = server_of("embed")
    client, expected = openai_client(server), batch_rows(server)
    texts = [row["text"] for row in ROWS]
    (model,) = client.models.list().data
    assert model.id == server.name == client.models.retrieve(model.id).id
    for encoding in ("base64", "float"):
        found = client.embeddings.create(
            model=server.name,
            input=texts,
            encoding_format=encoding,  # type: ignore[arg-type]
        )
        vectors: Any = [each.embedding for each in found.data]
        if encoding == "float":
            np.testing.assert_allclose(
                vectors, [row["embedding"] for row in expected], rtol=1e-4, atol=1e-5
            )
    plain = client.embeddings.create(model=server.name, input=texts[0])  # base64 on the wire
    np.testing.assert_allclose(plain.data[0].embedding, expected[0]["embedding"], rtol=1e-4)
    assert plain.usage.prompt_tokens == expected[0]["num_tokens_in"]
    ids = server.post("/tokenize", {"inputs": texts[0]}).json()
    assert ids["count"] == len(ids["ids"]) == expected[0]["num_tokens_in"]
    by_ids = client.embeddings.create(model=server.name, input=ids["ids"])
    np.testing.assert_allclose(by_ids.data[0].embedding, plain.data[0].embedding, rtol=1e-4)
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="another", input="a")
    assert missing.value.body["type"] == "model_not_found"  # type: ignore[index]
    with pytest.raises(openai.UnprocessableEntityError) as long:
        client.embeddings.create(model=server.name, input="long " * 400)
    assert long.value.type == "too_long"
    with pytest.raises(openai.UnprocessableEntityError):
        client.embeddings.create(model=server.name, input=texts[0], dimensions=7)


def test_openai_completions(server_of: Callable[[str], Server]) -> None:
    server = server_of("summarize")
    client, expected = openai_client(server), batch_rows(server)
    for row, own in zip(ROWS, expected, strict=True):
        found = client.completions.create(model=server.name, prompt=row["text"])
        assert found.choices[0].text == own["summary"]
        assert found.usage
        assert found.usage.prompt_tokens == own["num_tokens_in"]
    chat = client.chat.completions.create(
        model=server.name,
        messages=[
            {"role": "system", "content": "Summarize."},
            {"role": "user", "content": [{"type": "text", "text": ROWS[0]["text"]}]},
        ],
    )
    assert chat.choices[0].message.content == expected[0]["summary"]
    drawn = [
        client.completions.create(
            model=server.name, prompt=ROWS[0]["text"], temperature=1.5, seed=seed, max_tokens=20
        )
        .choices[0]
        .text
        for seed in (1, 2, 1)
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    hub_chat = hub(server).chat_completion([{"role": "user", "content": ROWS[1]["text"]}])
    assert hub_chat.choices[0].message.content == expected[1]["summary"]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_openai_streams(num_beams: int, server_of: Callable[[str], Server]) -> None:
    """The pieces make the text that is answered at once, and come one after the other."""
    server = server_of("summarize")
    client = openai_client(server)
    given: Any = {"model": server.name, "max_tokens": 30, "extra_body": {"num_beams": num_beams}}
    text = ROWS[2]["text"]
    whole = client.completions.create(prompt=text, **given)
    chunks = list(
        client.completions.create(
            prompt=text, stream=True, stream_options={"include_usage": True}, **given
        )
    )
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    talk: Any = [{"role": "user", "content": text}]
    chat = client.chat.completions.create(messages=talk, stream=True, **given)
    told = [chunk.choices[0].delta.content or "" for chunk in chat]
    assert "".join(told) == whole.choices[0].text
    if num_beams == 1:
        assert len([piece for piece in pieces if piece]) > 1
