"""Longformer and its heads against the published implementation: same weights, same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longformer_core.config import LongformerConfig
from longformer_core.errors import ShapeError, TooLongError
from longformer_core.models.longformer import LongformerForMaskedLM, LongformerModel
from tests.longformer_core.models.published import (
    PAD,
    SEP,
    VOCAB,
    batch,
    compare_fields,
    compare_gradients,
    difference,
)
from tests.longformer_core.models.published import pair as published_pair

CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 130,
    "type_vocab_size": 2,
    "attention_window": [8, 16, 4],
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    # With the default of 0.02 the attention is uniform and no comparison could see it.
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "sep_token_id": SEP,
}
HEADS = (
    "LongformerForMaskedLM",
    "LongformerForSequenceClassification",
    "LongformerForTokenClassification",
    "LongformerForQuestionAnswering",
    "LongformerForMultipleChoice",
)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


def pair(folder: Path, name: str, **options: Any) -> tuple[Any, Any]:
    return published_pair(folder, name, CONFIG | options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return pair(tmp_path_factory.mktemp("longformer"), "LongformerModel")


def with_separators(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        last = int(mask.sum()) - 1
        row[[last // 3, last // 3 + 1, last]] = SEP
    return inputs


def test_the_oracle_sees_masks_windows_and_globals(base: tuple[Any, Any]) -> None:
    published, _ = base
    inputs = batch()
    with torch.no_grad():
        plain = published(**inputs).last_hidden_state
        first = torch.zeros_like(inputs["input_ids"])
        first[:, 0] = 1
        with_global = published(**inputs, global_attention_mask=first).last_hidden_state
        moved = inputs["input_ids"].clone()
        moved[2, 10] = 5 + (moved[2, 10] - 4) % (VOCAB - 5)
        changed = published(moved, inputs["attention_mask"]).last_hidden_state
    assert difference(with_global[2], plain[2]) > 0.05
    per_token = (changed[2] - plain[2]).norm(dim=-1)
    assert per_token[12] > 1e-3, "a neighbour is not seen"
    assert per_token[40] == 0, "the windows do not end"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_batch(base: tuple[Any, Any], data: st.DataObject) -> None:
    published, ours = base
    lengths = tuple(data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=4)))
    inputs = batch(lengths, data.draw(st.integers(0, 99)))
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    holes = data.draw(st.lists(st.integers(0, ids.shape[1] - 1), max_size=4))
    mask[0, holes] = 0
    mask[0, 0] = 1
    kind = data.draw(st.sampled_from(["none", "first", "some", "minus", "all", "two"]))
    marks = torch.zeros_like(ids)
    if kind == "first":
        marks[:, 0] = 1
    elif kind in ("some", "minus"):
        some = data.draw(st.lists(st.integers(0, ids.shape[1] - 1), max_size=20))
        marks[:, some] = 1
        if kind == "minus":
            marks[mask == 0] = -1
    elif kind == "all":
        marks[:] = 1
    elif kind == "two":
        mask = inputs["attention_mask"] = mask * 2
    options: dict[str, Any] = {} if kind in ("none", "two") else {"global_attention_mask": marks}
    if data.draw(st.booleans()):
        options["token_type_ids"] = (ids % 2).long()
    with torch.no_grad():
        expected = published(**inputs, **options, output_hidden_states=True)
        got = ours(**inputs, **options, output_hidden_states=True)
    assert len(got.hidden_states) == len(expected.hidden_states) == 4
    for mine, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        # What lies under the padding is equal as well: a span's loss runs over all slots.
        assert difference(mine, theirs) <= 1e-5
    assert difference(got.pooler_output, expected.pooler_output) <= 1e-5


def head_inputs(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of a head and its labels."""
    inputs = with_separators(batch((50, 20, 90, 17)))
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 3, inputs["input_ids"].shape, generator=draw)
    tokens[inputs["attention_mask"] == 0] = -100
    if name == "LongformerForMultipleChoice":
        inputs = {k: v.view(2, 2, -1) for k, v in inputs.items()}
        return inputs, {"labels": torch.tensor([1, 0])}
    if name == "LongformerForQuestionAnswering":
        positions = {"start_positions": [3, 0, 500, 2], "end_positions": [9, 4, 500, -3]}
        return inputs, {k: torch.tensor(v) for k, v in positions.items()}
    if name == "LongformerForSequenceClassification":
        return inputs, {"labels": torch.tensor([0, 2, 1, 1])}
    return inputs, {"labels": tokens}


@pytest.mark.parametrize("name", HEADS)
def test_heads_losses_and_gradients(tmp_path: Path, name: str) -> None:
    num_labels = {} if name in ("LongformerForQuestionAnswering",) else {"num_labels": 3}
    published, ours = pair(tmp_path, name, **num_labels)
    inputs, labels = head_inputs(name)
    if name in ("LongformerForMaskedLM", "LongformerForTokenClassification"):
        marks = torch.zeros_like(inputs["input_ids"])
        marks[:, [0, 7, 8, 16]] = 1
        inputs["global_attention_mask"] = marks
    expected, got = published(**inputs, **labels), ours(**inputs, **labels)
    assert difference(got.loss, expected.loss) <= 1e-5
    for key in ("logits", "start_logits", "end_logits"):
        if key in expected:
            assert difference(got[key], expected[key]) <= 1e-5, key
    expected.loss.backward()
    got.loss.backward()
    compare_gradients(ours, published)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (torch.tensor([0.5, -1.0, 2.0, 0.0]), {"num_labels": 1}),
        (torch.tensor([[1.0, 0, 1]] * 4), {"num_labels": 3}),
        (torch.tensor([[1, 0, 1]] * 4).float(), {"problem_type": "multi_label_classification"}),
    ],
    ids=["regression", "inferred", "told"],
)
def test_kinds_of_problems(tmp_path: Path, labels: Tensor, options: dict[str, Any]) -> None:
    name = "LongformerForSequenceClassification"
    published, ours = pair(tmp_path, name, **{"num_labels": 3} | options)
    inputs = batch()
    with torch.no_grad():
        expected, got = published(**inputs, labels=labels), ours(**inputs, labels=labels)
    assert difference(got.loss, expected.loss) <= 1e-5


@pytest.mark.parametrize("name", ["LongformerModel", *HEADS])
def test_what_we_write_the_published_class_reads(tmp_path: Path, name: str) -> None:
    _, ours = pair(tmp_path / "a", name, num_labels=2 if "Question" in name else 3)
    ours.save_pretrained(tmp_path / "b")
    published, told = getattr(transformers, name).from_pretrained(
        tmp_path / "b", output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert published.config.num_labels == ours.config.num_labels
    theirs = published.state_dict()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs[key]), key
    again = LongformerConfig.from_pretrained(tmp_path / "b")
    assert again.to_dict() == LongformerConfig.from_pretrained(tmp_path / "b").to_dict()


@torch.no_grad()
@pytest.mark.parametrize("marked", [[], [0], [0, 7, 8, 30]])
@pytest.mark.parametrize("name", ["LongformerModel", *HEADS])
def test_every_field(tmp_path: Path, name: str, marked: list[int]) -> None:
    num_labels = 2 if "Question" in name else 3
    published, ours = pair(tmp_path, name, num_labels=num_labels)
    inputs, labels = head_inputs(name) if name in HEADS else (batch(), {})
    marks = torch.zeros_like(inputs["input_ids"])
    marks[..., marked] = 1
    options = {"global_attention_mask": marks, "output_attentions": True} | labels
    expected = published(**inputs, **options, output_hidden_states=True)
    got = ours(**inputs, **options, output_hidden_states=True)
    if marked:
        counts = (marks * inputs["attention_mask"]).flatten(0, -2).sum(-1)
        # The reference leaves the padding to its window in, and fills columns that a document does
        # not have.
        size = marks.shape[-1]
        has = torch.arange(int(counts.max())) < counts[:, None, None, None]
        expected["global_attentions"] = tuple(
            m[:, :, :size] * has for m in expected.global_attentions
        )
    compare_fields(got, expected)
    as_tuple = ours(**inputs, **options, return_dict=False)
    names = [key for key in expected if key != "hidden_states"]
    assert len(as_tuple) == len(names)
    for value, key in zip(as_tuple, names, strict=True):
        tensors = (
            zip(value, got[key], strict=True) if isinstance(value, tuple) else [(value, got[key])]
        )
        assert all(torch.equal(a, b) for a, b in tensors)


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, "LongformerForMaskedLM")
    assert isinstance(ours, LongformerForMaskedLM)
    assert ours.lm_head.decoder.weight is ours.longformer.embeddings.word_embeddings.weight
    assert ours.lm_head.bias is ours.lm_head.decoder.bias


def test_embeddings_instead_of_ids(base: tuple[Any, Any]) -> None:
    published, ours = base
    assert isinstance(ours, LongformerModel)
    inputs = batch((40, 40))
    words = ours.embeddings.word_embeddings(inputs["input_ids"])
    with torch.no_grad():
        expected = published(inputs_embeds=words).last_hidden_state
        got = ours(inputs_embeds=words).last_hidden_state
    assert difference(got, expected) <= 1e-5


def test_padding_changes_nothing(base: tuple[Any, Any]) -> None:
    _, ours = base
    inputs = batch((33, 90))
    with torch.no_grad():
        alone = ours(inputs["input_ids"][:1, :33]).last_hidden_state
        beside = ours(**inputs).last_hidden_state
    assert difference(beside[:1, :33], alone) <= 1e-6


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ({}, ShapeError, "either input_ids or inputs_embeds"),
        (
            {"input_ids": torch.full((1, 4), VOCAB)},
            ShapeError,
            "input_ids reach from 60 to 60 .* ids 0 to 59",
        ),
        ({"input_ids": torch.full((1, 129), 5)}, TooLongError, "129 tokens .* 128 positions"),
        (
            {"input_ids": torch.full((1, 4), 5), "head_mask": None},
            TypeError,
            "no argument 'head_mask'",
        ),
        (
            {"input_ids": torch.full((1, 4), 5), "attention_mask": torch.ones(1, 5)},
            ShapeError,
            r"attention_mask has shape \[1, 5\]",
        ),
        (
            {"input_ids": torch.full((1, 4), 5), "token_type_ids": torch.full((1, 4), 2)},
            ShapeError,
            "token_type_ids reach from 2 to 2",
        ),
    ],
)
def test_wrong_inputs_are_named(
    base: tuple[Any, Any], inputs: dict[str, Tensor], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        base[1](**inputs)


def test_a_question_without_an_end_is_refused(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, "LongformerForQuestionAnswering")
    with pytest.raises(ShapeError, match="no separator token"):
        ours(torch.full((1, 8), 5))


@pytest.mark.parametrize("name", ["LongformerForMaskedLM", "LongformerForTokenClassification"])
def test_labels_of_masked_tokens_are_refused(tmp_path: Path, name: str) -> None:
    _, ours = pair(tmp_path, name)
    inputs = batch((9, 4))
    labels = torch.where(inputs["attention_mask"] > 0, 1, -100)
    assert ours(**inputs, labels=labels).loss > 0
    labels[1, 6] = 1
    with pytest.raises(ShapeError, match="row 1 has label 1 at position 6"):
        ours(**inputs, labels=labels)
