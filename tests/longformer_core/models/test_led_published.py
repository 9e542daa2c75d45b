"""LED's published classes, on padded batches, against the published implementation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longformer_core import (
    ConfigError,
    LEDConfig,
    LEDForConditionalGeneration,
    LEDForQuestionAnswering,
    LEDForSequenceClassification,
    LEDModel,
    ShapeError,
    TooLongError,
)
from tests.longformer_core.models.published import (
    PAD,
    VOCAB,
    batch,
    compare_fields,
    compare_gradients,
    difference,
    pair,
)

CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_encoder_position_embeddings": 128,
    "max_decoder_position_embeddings": 48,
    "attention_window": [8, 16, 4],
    "dropout": 0.0,
    # With the default of 0.02 the decoder ignores its source and no comparison could see it.
    "init_std": 0.3,
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LEDModel]:
    return pair(tmp_path_factory.mktemp("led"), "LEDModel", CONFIG)


@pytest.fixture(scope="module")
def writer(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, LEDForConditionalGeneration]:
    return pair(tmp_path_factory.mktemp("led"), "LEDForConditionalGeneration", CONFIG)


def targets(num_rows: int, length: int = 12, seed: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (num_rows, length), generator=draw)


@torch.no_grad()
def test_the_oracle_sees_its_source(base: tuple[Any, LEDModel]) -> None:
    published, _ = base
    inputs = batch()
    read = {"decoder_input_ids": targets(4)}
    plain = published(**inputs, **read).last_hidden_state
    moved = inputs["input_ids"].clone()
    moved[2, 60] = 5 + (moved[2, 60] - 4) % (VOCAB - 5)
    other = published(moved, inputs["attention_mask"], **read).last_hidden_state
    assert difference(other[2], plain[2]) > 1e-3
    assert difference(other[0], plain[0]) == 0
    first = torch.zeros_like(moved)
    first[:, 0] = 1
    marked = published(**inputs, **read, global_attention_mask=first).last_hidden_state
    assert difference(marked, plain) > 1e-2


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_batch(base: tuple[Any, LEDModel], data: st.DataObject) -> None:
    published, ours = base
    lengths = tuple(data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=3)))
    inputs = batch(lengths, data.draw(st.integers(0, 99)))
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    holes = (
        data.draw(st.lists(st.integers(1, ids.shape[1] - 1), max_size=4))
        if max(lengths) > 1
        else []
    )
    mask[0, holes] = 0
    marks = torch.zeros_like(ids)
    kind = data.draw(st.sampled_from(["none", "first", "some", "minus", "visible minus"]))
    if kind == "first":
        marks[:, 0] = 1
    elif kind != "none":
        marks[:, data.draw(st.lists(st.integers(0, ids.shape[1] - 1), max_size=20))] = 1
        if "minus" in kind:
            marks[mask == 0] = -1
    options: dict[str, Any] = {} if kind == "none" else {"global_attention_mask": marks}
    if kind == "visible minus":
        # Masked in the encoder, and still there for the decoder.
        inputs.pop("attention_mask")
    read = targets(len(lengths), data.draw(st.integers(1, 30)))
    with torch.no_grad():
        expected, got = (
            model(**inputs, **options, decoder_input_ids=read, output_hidden_states=True)
            for model in (published, ours)
        )
    assert difference(got.last_hidden_state, expected.last_hidden_state) <= 1e-5
    for field in ("decoder_hidden_states", "encoder_hidden_states"):
        for mine, theirs in zip(got[field], expected[field], strict=True):
            seen = mask.bool() if field.startswith("encoder") else torch.ones_like(read).bool()
            if kind == "visible minus" and field.startswith("encoder"):
                seen = torch.ones_like(mask).bool()
            assert difference(mine[seen], theirs[seen]) <= 1e-5


@torch.no_grad()
def test_left_padding_changes_nothing(base: tuple[Any, LEDModel]) -> None:
    _, ours = base
    inputs = batch((40, 25))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    shifted = ids.clone()
    shifted[1] = ids[1].roll(15)
    marks = torch.zeros_like(ids)
    marks[:, 0] = 1
    left = marks.clone()
    left[1] = marks[1].roll(15)
    read = targets(2)
    right = ours(ids, mask, read, global_attention_mask=marks)
    got = ours(shifted, shifted.ne(PAD), read, global_attention_mask=left)
    assert difference(got.last_hidden_state, right.last_hidden_state) <= 1e-6
    assert difference(got[2][1, 15:], right[2][1, :25]) <= 1e-6


@pytest.mark.parametrize("padding", ["full", "right"])
def test_what_a_writer_returns(writer: tuple[Any, Any], padding: str) -> None:
    published, ours = writer
    inputs = batch((50, 50)) if padding == "full" else batch((50, 31))
    marks = torch.zeros_like(inputs["input_ids"])
    marks[:, [0, 7, 30]] = 1
    labels = targets(2)
    labels[1, 8:] = -100
    options = {
        "global_attention_mask": marks,
        "labels": labels,
        "output_attentions": True,
        "output_hidden_states": True,
    }
    with torch.no_grad():
        expected, got = (model(**inputs, **options) for model in (published, ours))
        as_tuple = ours(**inputs, **options, return_dict=False)
    size = inputs["input_ids"].shape[1]
    # The reference leaves the padding to its window in.
    expected["encoder_global_attentions"] = tuple(
        m[:, :, :size] for m in expected.encoder_global_attentions
    )
    seen = inputs["attention_mask"].bool()[..., None]
    for output in (expected, got):
        output.encoder_last_hidden_state *= seen
        for states in output.encoder_hidden_states:
            states *= seen
    compare_fields(got, expected)
    assert len(as_tuple) == len(got.keys())
    assert torch.equal(as_tuple[1], got.logits)
    assert got[0] is got.loss
    assert got["logits"] is got.logits


HEADS = ("LEDForConditionalGeneration", "LEDForQuestionAnswering")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("with_global", [True, False])
def test_losses_and_gradients(tmp_path: Path, name: str, with_global: bool) -> None:
    published, ours = pair(tmp_path, name, CONFIG)
    inputs = batch((40, 20, 33))
    if with_global:
        marks = torch.zeros_like(inputs["input_ids"])
        marks[:, [0, 7, 8, 16]] = 1
        inputs["global_attention_mask"] = marks
    if name == "LEDForQuestionAnswering":
        inputs |= {
            "start_positions": torch.tensor([3, 0, 500]),
            "end_positions": torch.tensor([9, 4, -3]),
        }
    else:
        inputs["labels"] = targets(3)
        inputs["labels"][1, 5:] = -100
    expected, got = published(**inputs), ours(**inputs)
    assert difference(got.loss, expected.loss) <= 1e-5
    expected.loss.backward()
    got.loss.backward()
    compare_gradients(ours, published)


@torch.no_grad()
@pytest.mark.parametrize("steps", [(1, 1, 1), (4, 1, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_cached_decoding(
    writer: tuple[Any, LEDForConditionalGeneration], steps: tuple[int, ...], masked: bool
) -> None:
    _, ours = writer
    inputs = batch((50, 31))
    read = targets(2, sum(steps))
    mask = torch.ones_like(read)
    if masked:
        mask[1, :2] = 0
    whole = ours(**inputs, decoder_input_ids=read, decoder_attention_mask=mask).logits
    encoded = ours.led.encode_padded(**inputs)
    past, found, start = None, [], 0
    for step in steps:
        output = ours(
            attention_mask=inputs["attention_mask"],
            encoder_outputs=encoded,
            decoder_input_ids=read[:, start : start + step],
            decoder_attention_mask=mask[:, : start + step],
            past_key_values=past,
        )
        past, start = output.past_key_values, start + step
        assert past.get_seq_length() == start
        found.append(output.logits)
    seen = mask.bool()
    assert difference(torch.cat(found, 1)[seen], whole[seen]) <= 1e-6


@torch.no_grad()
def test_a_decoder_mask_against_the_published_one(
    writer: tuple[Any, LEDForConditionalGeneration],
) -> None:
    published, ours = writer
    inputs = batch((50, 31))
    read = targets(2)
    mask = torch.ones_like(read)
    mask[0, 3] = mask[1, 6:] = 0
    options = {"decoder_input_ids": read, "decoder_attention_mask": mask}
    expected, got = (model(**inputs, **options).logits for model in (published, ours))
    seen = mask.bool()
    assert difference(got[seen], expected[seen]) <= 1e-5


@torch.no_grad()
def test_embeddings_instead_of_ids(writer: tuple[Any, LEDForConditionalGeneration]) -> None:
    published, ours = writer
    inputs = batch((40, 25))
    words = ours.get_input_embeddings()(inputs["input_ids"])
    read = ours.get_input_embeddings()(targets(2))
    mask = inputs["attention_mask"]
    expected, got = (
        model(inputs_embeds=words, attention_mask=mask, decoder_inputs_embeds=read).logits
        for model in (published, ours)
    )
    assert difference(got, expected) <= 1e-5


def test_a_classifier_reads_the_last_end() -> None:
    """What transformers 5 dropped; compared with transformers 4 in the legacy tests."""
    torch.manual_seed(0)
    model = LEDForSequenceClassification(LEDConfig(**CONFIG, num_labels=3)).eval()
    inputs = batch((20, 9))
    for row, end in enumerate((19, 8)):
        inputs["input_ids"][row, end] = 2
    labels = torch.tensor([2, 0])
    output = model(**inputs, labels=labels)
    states = model.led(**inputs).last_hidden_state
    expected = model.classification_head(torch.stack([states[0, 19], states[1, 8]]))
    assert torch.allclose(output.logits, expected, atol=1e-6)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(expected, labels))
    read = targets(2)
    mask = torch.ones_like(read)
    mask[1, 7:] = 0
    states = model.led(**inputs, decoder_input_ids=read, decoder_attention_mask=mask)[0]
    expected = model.classification_head(torch.stack([states[0, -1], states[1, 6]]))
    got = model(**inputs, decoder_input_ids=read, decoder_attention_mask=mask).logits
    assert torch.allclose(got, expected, atol=1e-6)
    with pytest.raises(ShapeError, match="does not contain the end token"):
        model(torch.full((1, 5), 7))


def test_long_sources_for_question_answering() -> None:
    model = LEDForQuestionAnswering(LEDConfig(**CONFIG)).eval()
    source = torch.full((1, 128), 7)
    output = model(source, decoder_input_ids=source[:, :48])
    assert output.start_logits.shape == (1, 48)
    with pytest.raises(TooLongError, match=r"128 tokens are more than its 48 .* has 128"):
        model(source)
    with pytest.raises(TooLongError, match="129 tokens but the encoder has 128"):
        model(torch.full((1, 129), 7), decoder_input_ids=source[:, :48])
    with pytest.raises(TooLongError, match="targets of 49 tokens"):
        model(source, decoder_input_ids=source[:, :49])


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ({}, ShapeError, "nothing for the decoder to read"),
        ({"decoder_input_ids": torch.full((1, 2), 5)}, ShapeError, "either input_ids or"),
        (
            {"input_ids": torch.full((1, 4), 5), "decoder_input_ids": torch.full((1, 2), VOCAB)},
            ShapeError,
            "decoder_input_ids reach from 60",
        ),
        (
            {
                "input_ids": torch.full((1, 4), 5),
                "labels": torch.full((1, 3), 5),
                "decoder_attention_mask": torch.tensor([[1, 1, 0]]),
            },
            ShapeError,
            "row 0 has label 5 at position 2",
        ),
        (
            {"input_ids": torch.full((1, 4), 5), "decoder_attention_mask": torch.ones(1, 9)},
            ShapeError,
            r"decoder_attention_mask has shape \[1, 9\]",
        ),
        (
            {"input_ids": torch.full((1, 4), 5), "attention_mask": torch.ones(1, 9)},
            ShapeError,
            r"attention_mask has shape \[1, 9\]",
        ),
        ({"input_ids": torch.full((1, 4), 5), "global_attn_mask": 1}, TypeError, "did you mean"),
    ],
)
def test_wrong_inputs_are_named(
    writer: tuple[Any, Any], inputs: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        writer[1](**inputs)


def test_layers_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    config = LEDConfig(**CONFIG | {"encoder_layerdrop": 1.0, "decoder_layerdrop": 1.0})
    model = LEDModel(config).train()
    inputs = batch((20,))
    output = model(
        **inputs, decoder_input_ids=targets(1), output_hidden_states=True, output_attentions=True
    )
    assert torch.equal(output.encoder_hidden_states[0], output.encoder_hidden_states[-1])
    assert len(output.encoder_attentions) == 3
    assert output.decoder_attentions == ()
    model.eval()
    output = model(**inputs, decoder_input_ids=targets(1), output_hidden_states=True)
    assert not torch.equal(output.encoder_hidden_states[0], output.encoder_hidden_states[-1])


def test_a_config_without_padding_cannot_shift() -> None:
    model = LEDModel(LEDConfig(**CONFIG | {"pad_token_id": None})).eval()
    with pytest.raises(ConfigError, match="pad_token_id is None"):
        model(torch.full((1, 4), 5))
