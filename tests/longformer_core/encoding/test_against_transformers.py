"""The engine against the published library's padded calls, on real texts of mixed lengths."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from longformer_core.config import LEDConfig
from longformer_core.encoding.engine import EncodingEngine
from longformer_core.encoding.request import Encoding, EncodingRequest
from longformer_core.models.led_heads import LEDForSequenceClassification
from tests.longformer_core.encoding.helpers import SEP, SMALL, padded, real_documents
from tests.longformer_core.models.published import difference, pair

LENGTHS = [33, 250, 5, 90, 130, 9, 61, 17, 180, 44]
LED: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_encoder_position_embeddings": 256,
    "max_decoder_position_embeddings": 256,
    "attention_window": [8, 16],
    "init_std": 0.3,
}
LIMIT = 1e-5


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


def both(
    folder: Path, name: str, *, pairs: bool = False, **options: Any
) -> tuple[Any, Any, list[list[int]]]:
    texts, vocab_size = real_documents(LENGTHS, pairs=pairs)
    config = LED if name.startswith("LED") else SMALL | {"max_position_embeddings": 260}
    given = config | {"vocab_size": vocab_size} | options
    theirs, ours = pair(folder, name, given)
    return theirs, ours, texts


def read(model: Any, requests: list[EncodingRequest]) -> list[Encoding]:
    """Read with a budget that makes several packs."""
    outcomes = dict(EncodingEngine(model, batch_tokens=300).run(requests))
    found = [outcomes[i] for i in range(len(requests))]
    assert [outcome.error for outcome in found] == [None] * len(found)
    return found


def compare(got: list[Tensor | None], expected: list[Tensor]) -> None:
    """Compare one document after another, and show that the documents differ."""
    for mine, theirs in zip(got, expected, strict=True):
        assert mine is not None
        assert mine.dtype == torch.float32
        assert difference(mine, theirs) <= LIMIT
    # One number of a normalized state may hardly move.
    firsts = torch.stack([theirs.flatten()[:4] for theirs in expected])
    assert firsts.std(0).max() > 1e-2


def cut(padded_results: Tensor, texts: list[list[int]]) -> list[Tensor]:
    return [row[: len(text)] for row, text in zip(padded_results, texts, strict=True)]


@torch.no_grad()
def test_states_and_their_means(tmp_path: Path) -> None:
    theirs, ours, texts = both(tmp_path, "LongformerModel")
    marks = [[0, len(text) // 2] for text in texts]
    spans = [[(0, 3), (1, len(text)), (len(text) - 2, len(text) - 1)] for text in texts]
    requests = [
        EncodingRequest(
            text, mark, want=["states", "first", "mean", "pooler"], spans=span,
            mean_positions=[1, 3] if i % 2 else None,
        )
        for i, (text, mark, span) in enumerate(zip(texts, marks, spans, strict=True))
    ]  # fmt: skip
    inputs = padded(texts)
    mask = torch.zeros_like(inputs["input_ids"])
    for row, mark in enumerate(marks):
        mask[row, mark] = 1
    output = theirs(**inputs, global_attention_mask=mask)
    states = cut(output.last_hidden_state, texts)
    found = read(ours, requests)
    compare([one.states for one in found], states)
    compare([one.first for one in found], [s[0] for s in states])
    compare([one.pooler for one in found], list(output.pooler_output))
    text_means = [s[[1, 3]].mean(0) if i % 2 else s[1:-1].mean(0) for i, s in enumerate(states)]
    compare([one.mean for one in found], text_means)
    means = [
        torch.stack([s[a:b].mean(0) for a, b in own]) for s, own in zip(states, spans, strict=True)
    ]
    compare([one.span_means for one in found], means)


@torch.no_grad()
def test_without_positions_the_model_itself_decides(tmp_path: Path) -> None:
    theirs, ours, texts = both(tmp_path, "LongformerModel")
    states = cut(theirs(**padded(texts)).last_hidden_state, texts)
    found = read(ours, [EncodingRequest(text, want=["states"]) for text in texts])
    compare([one.states for one in found], states)


@torch.no_grad()
def test_masked_tokens(tmp_path: Path) -> None:
    theirs, ours, texts = both(tmp_path, "LongformerForMaskedLM")
    places = [[len(text) - 2, 1] if i % 3 else [] for i, text in enumerate(texts)]
    requests = [
        EncodingRequest(text, logit_positions=own, want=["first"])
        for text, own in zip(texts, places, strict=True)
    ]
    logits = theirs(**padded(texts)).logits
    found = read(ours, requests)
    asked = [i for i, own in enumerate(places) if own]
    compare([found[i].logits for i in asked], [logits[i, places[i]] for i in asked])
    assert all(found[i].logits is None for i, own in enumerate(places) if not own)


@torch.no_grad()
def test_classes_of_documents(tmp_path: Path) -> None:
    theirs, ours, texts = both(tmp_path, "LongformerForSequenceClassification", num_labels=5)
    found = read(ours, [EncodingRequest(text) for text in texts])
    compare([one.logits for one in found], list(theirs(**padded(texts)).logits))


@torch.no_grad()
def test_classes_of_tokens(tmp_path: Path) -> None:
    theirs, ours, texts = both(tmp_path, "LongformerForTokenClassification", num_labels=7)
    found = read(ours, [EncodingRequest(text) for text in texts])
    compare([one.logits for one in found], cut(theirs(**padded(texts)).logits, texts))


@torch.no_grad()
def test_answers_to_questions(tmp_path: Path) -> None:
    theirs, ours, texts = both(tmp_path, "LongformerForQuestionAnswering", pairs=True)
    output = theirs(**padded(texts))
    found = read(ours, [EncodingRequest(text) for text in texts])
    compare([one.start_logits for one in found], cut(output.start_logits, texts))
    compare([one.end_logits for one in found], cut(output.end_logits, texts))


@torch.no_grad()
def test_choices(tmp_path: Path) -> None:
    """Two documents with five choices each: a request is one choice."""
    theirs, ours, texts = both(tmp_path, "LongformerForMultipleChoice", pairs=True)
    inputs = {name: x.view(2, 5, -1) for name, x in padded(texts).items()}
    # The published default takes the wrong side of choices behind their question.
    marks = torch.zeros_like(inputs["input_ids"])
    for row, text in zip(marks.flatten(0, 1), texts, strict=True):
        row[text.index(SEP) + 2 : len(text)] = 1
    scores = theirs(**inputs, global_attention_mask=marks).logits.flatten()
    found = read(ours, [EncodingRequest(text) for text in texts])
    compare([one.logits for one in found], list(scores[:, None]))


@torch.no_grad()
def test_hidden_tokens_and_token_types(tmp_path: Path) -> None:
    theirs, ours, texts = both(tmp_path, "LongformerForTokenClassification")
    inputs = padded(texts)
    types = torch.zeros_like(inputs["input_ids"])
    valid = []
    for row, text in enumerate(texts):
        types[row, len(text) // 2 : len(text)] = 1
        own = [place == 0 or place % 4 != 3 for place in range(len(text))]
        own[-1] = True
        valid.append(own)
        inputs["attention_mask"][row, : len(text)] = torch.tensor(own).long()
    logits = theirs(**inputs, token_type_ids=types).logits
    requests = [
        EncodingRequest(
            text, valid=own if i % 2 else None, token_type_ids=types[i, : len(text)].tolist()
        )
        for i, (text, own) in enumerate(zip(texts, valid, strict=True))
    ]
    # Documents without flags beside those with them.
    inputs["attention_mask"] = padded(texts)["attention_mask"]
    whole = theirs(**inputs, token_type_ids=types).logits
    expected = [logits[i] if i % 2 else whole[i] for i in range(len(texts))]
    seen = [torch.tensor(own) if i % 2 else slice(None) for i, own in enumerate(valid)]
    got = [one.logits for one in read(ours, requests)]
    compare(
        [None if mine is None else mine[flags] for mine, flags in zip(got, seen, strict=True)],
        [e[: len(t)][f] for e, t, f in zip(expected, texts, seen, strict=True)],
    )


@torch.no_grad()
def test_the_encoder_of_an_led(tmp_path: Path) -> None:
    theirs, ours, texts = both(tmp_path, "LEDModel")
    marks = torch.zeros_like(padded(texts)["input_ids"])
    marks[:, 0] = 1
    encoder = theirs.get_encoder()
    states = cut(encoder(**padded(texts), global_attention_mask=marks).last_hidden_state, texts)
    found = read(ours, [EncodingRequest(t, [0], want=["states", "mean"]) for t in texts])
    compare([one.states for one in found], states)
    compare([one.mean for one in found], [s[1:-1].mean(0) for s in states])


@torch.no_grad()
def test_an_led_answers_questions(tmp_path: Path) -> None:
    theirs, ours, texts = both(tmp_path, "LEDForQuestionAnswering")
    marks = torch.zeros_like(padded(texts)["input_ids"])
    marks[:, 0] = 1
    # Both round in float32, and of the two only ours is under test.
    output = theirs.double()(**padded(texts), global_attention_mask=marks)
    found = read(ours, [EncodingRequest(text, [0]) for text in texts])
    compare([one.start_logits for one in found], cut(output.start_logits, texts))
    compare([one.end_logits for one in found], cut(output.end_logits, texts))


@torch.no_grad()
def test_an_led_classifies() -> None:
    """The published library has this class no more: our padded forward, one by one, is compared
    with its last release in tests/legacy."""
    texts, vocab_size = real_documents(LENGTHS)
    # The last end token decides, not the last token.
    texts[1][-1] = 7
    texts[1][60] = SEP
    torch.manual_seed(0)
    model = LEDForSequenceClassification(LEDConfig(**LED | {"vocab_size": vocab_size})).eval()
    requests, expected = [], []
    for i, text in enumerate(texts):
        hidden = [i % 2 == 1 and place % 5 == 4 for place in range(len(text))]
        requests.append(EncodingRequest(text, [0], valid=[not flag for flag in hidden]))
        ids = torch.tensor([text])
        mask = torch.tensor([hidden]).logical_not().long()
        marks = torch.zeros_like(ids)
        marks[:, 0] = 1
        output = model(input_ids=ids, attention_mask=mask, global_attention_mask=marks)
        expected.append(output.logits[0])
    compare([one.logits for one in read(model, requests)], expected)
