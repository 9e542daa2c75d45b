import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.errors import CheckpointError, ConfigError
from longformer_core.layout import Layout
from longformer_core.models import led, longformer
from longformer_core.models.layers import activation
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.models.longformer import (
    LongformerForMaskedLM,
    LongformerForMultipleChoice,
    LongformerForQuestionAnswering,
    LongformerForSequenceClassification,
    LongformerModel,
)
from longformer_core.models.pretrained import PretrainedModel
from tests.helpers import LED_BASE, LONGFORMER_BASE, TINY
from tests.longformer_core.models.published import batch, difference
from tests.longformer_core.models.test_longformer import HEADS, pair

LONGFORMER_LARGE = LONGFORMER_BASE | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "attention_window": [512] * 24,
}
LED_LARGE: dict[str, Any] = {"attention_window": [1024] * 12}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 34,
    "attention_window": 4,
    "attention_probs_dropout_prob": 0.0,
}


def test_a_model_survives_its_directory(tmp_path: Path) -> None:
    model = LEDForConditionalGeneration(LEDConfig(vocab_size=50, **TINY)).eval()
    model.save_pretrained(tmp_path)

    again = LEDForConditionalGeneration.from_pretrained(tmp_path)

    assert not again.training
    assert again.lm_head.weight is again.led.shared.weight
    assert again.config.attention_window == model.config.attention_window
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_the_published_library_reads_what_was_saved(tmp_path: Path) -> None:
    model = LEDForConditionalGeneration(LEDConfig(vocab_size=50, **TINY)).eval()
    model.save_pretrained(tmp_path)

    theirs, info = transformers.LEDForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weights = theirs.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_cast_while_loading(led_directory: Path, dtype: torch.dtype) -> None:
    model = LEDForConditionalGeneration.from_pretrained(led_directory, dtype=dtype)

    assert model.dtype == dtype
    assert model.device == torch.device("cpu")
    assert model.final_logits_bias.dtype == dtype
    with torch.no_grad():
        states = model.encode(torch.tensor([0, 5, 6, 2]), Layout.from_lengths([4], [[0]]))
    assert states.isfinite().all()


BOTH = (
    (LongformerForMaskedLM, LongformerConfig(vocab_size=50, **SMALL)),
    (LEDForConditionalGeneration, LEDConfig(vocab_size=50, **TINY)),
)


@pytest.mark.parametrize(("kind", "config"), BOTH)
@pytest.mark.parametrize(
    ("asked", "size"), [((53,), 53), ((41,), 41), ((None, 8), 56), ((51, 64), 64)]
)
def test_another_vocabulary(kind: Any, config: Any, asked: tuple[Any, ...], size: int) -> None:
    torch.manual_seed(0)
    model = kind(config).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    embedding = model.resize_token_embeddings(*asked)
    assert embedding is model.get_input_embeddings()
    assert embedding.weight.shape[0] == embedding.num_embeddings == size
    assert (model.config.vocab_size, config.vocab_size) == (size, 50)
    assert model.base.config is model.config
    kept = min(50, size)
    for name, weight in model.state_dict().items():
        old = before[name]
        if old.shape == weight.shape:
            assert torch.equal(old, weight), name
        else:
            axis = [a == b for a, b in zip(old.shape, weight.shape, strict=True)].index(False)
            assert torch.equal(old.narrow(axis, 0, kept), weight.narrow(axis, 0, kept)), name
            assert weight.isfinite().all()
    logits = model(torch.tensor([[0, size - 1, 2]])).logits
    assert logits.shape[-1] == size
    tied = [p for p in model.parameters() if p is embedding.weight]
    assert len(tied) == 1
    again = model.state_dict()
    assert sum(w.data_ptr() == embedding.weight.data_ptr() for w in again.values()) >= 2


def test_other_embeddings_stay_tied() -> None:
    for kind, config in BOTH:
        model = kind(config)
        other = nn.Embedding(50, model.get_input_embeddings().embedding_dim)
        model.set_input_embeddings(other)
        ids = torch.tensor([[0, 7, 2]])
        model(ids).logits.sum().backward()
        weights = [
            w for w in model.state_dict().values() if w.data_ptr() == other.weight.data_ptr()
        ]
        assert len(weights) >= 2
        assert other.weight.grad is not None


@pytest.mark.parametrize(("kind", "config"), BOTH)
def test_parameters_are_counted_once(kind: Any, config: Any) -> None:
    model = kind(config)
    total = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    assert model.num_parameters() == total
    model.get_input_embeddings().weight.requires_grad_(False)
    shared = model.get_input_embeddings().weight.numel()
    assert model.num_parameters(only_trainable=True) == total - shared
    embeddings = {
        m.weight.data_ptr(): m.weight for m in model.modules() if isinstance(m, nn.Embedding)
    }
    assert model.num_parameters(exclude_embeddings=True) == total - sum(
        w.numel() for w in embeddings.values()
    )


@pytest.mark.parametrize(("kind", "config"), BOTH)
def test_checkpointing_changes_memory_only(kind: Any, config: Any) -> None:
    torch.manual_seed(0)
    model = kind(config).train()
    ids = torch.tensor([[0, 7, 9, 11, 2]])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(1)  # the same dropout
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    seen = []
    handle = model.base.encoder.register_forward_pre_hook(lambda *_: seen.append(1))
    again = gradients()
    handle.remove()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert plain.keys() == again.keys()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ConfigError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_dropout_is_for_training() -> None:
    for kind, config in BOTH:
        torch.manual_seed(0)
        model = kind(config)
        ids = torch.tensor([[0, 7, 9, 11, 2]])
        assert not torch.equal(model(ids).logits, model(ids).logits)
        model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_activations_go_by_their_published_names() -> None:
    for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh"):
        x = torch.linspace(-3, 3, 50)
        theirs = transformers.activations.ACT2FN[name](x)
        torch.testing.assert_close(activation(name)(x.clone().requires_grad_()), theirs)
        torch.testing.assert_close(activation(name)(x), theirs)
        torch.testing.assert_close(x, theirs, msg=f"{name} took fresh memory")
    x = torch.linspace(-3, 3, 50)
    assert not torch.equal(activation("gelu_new")(x.clone()), functional.gelu(x))


@pytest.mark.parametrize("name", HEADS)
def test_a_base_checkpoint_gets_a_new_head(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    published, _ = pair(tmp_path, "LongformerModel", num_labels=2, hidden_size=64)
    cls = getattr(longformer, name)
    with pytest.raises(CheckpointError, match=r"missing: .* load with allow_new_head=True"):
        cls.from_pretrained(tmp_path)
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING):
        ours = cls.from_pretrained(tmp_path, allow_new_head=True)
    inputs = batch()
    with torch.no_grad():
        expected = published(**inputs).last_hidden_state
        assert difference(ours.longformer(**inputs).last_hidden_state, expected) <= 1e-5
    drawn = {n: p for n, p in ours.named_parameters() if not n.startswith("longformer.")}
    (record,) = caplog.records
    for key, value in drawn.items():
        if name != "LongformerForMaskedLM" or "decoder" not in key:
            assert key in record.getMessage()
        if key.endswith("bias"):
            assert not value.any()
        elif "norm" in key:
            assert (value == 1).all()
        else:
            assert 0.25 < value.std() < 0.35  # initializer_range is 0.3


@pytest.mark.parametrize("name", HEADS)
def test_a_head_checkpoint_serves_the_base_class(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair(tmp_path, name)
    published = transformers.LongformerModel.from_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        ours = LongformerModel.from_pretrained(tmp_path)
    (record,) = caplog.records
    assert re.search(r"unexpected: (lm_head|classifier|qa_outputs)\.", record.getMessage())
    has_pooler = name == "LongformerForMultipleChoice"
    assert record.levelno == (logging.INFO if has_pooler else logging.WARNING)
    assert ("longformer.pooler.dense.weight" in record.getMessage()) != has_pooler
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        without = LongformerModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert not caplog.records
    inputs = batch()
    with torch.no_grad():
        expected, got, bare = published(**inputs), ours(**inputs), without(**inputs)
    assert difference(got.last_hidden_state, expected.last_hidden_state) <= 1e-5
    assert torch.equal(bare.last_hidden_state, got.last_hidden_state)
    assert bare.pooler_output is None
    if has_pooler:
        assert difference(got.pooler_output, expected.pooler_output) <= 1e-5
    else:
        assert ours.pooler.dense.weight.std() > 0.1  # drawn: initializer_range is 0.3


def test_a_head_that_needs_the_pooler_does_not_do_without(tmp_path: Path) -> None:
    pair(tmp_path, "LongformerForMultipleChoice")
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".pooler." not in name}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: longformer\.pooler\.dense\.weight"):
        LongformerForMultipleChoice.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_a_class_does_not_need_are_left_out(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    published, _ = pair(tmp_path, name)
    weights = load_file(tmp_path / "model.safetensors")
    weights["cls.seq_relationship.weight"] = torch.ones(2, 32)
    weights["second_head.weight"] = torch.ones(2, 32)
    save_file(weights, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO):
        ours = getattr(longformer, name).from_pretrained(tmp_path)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    left_out = "2 unexpected: cls.seq_relationship.weight, second_head.weight"
    assert left_out in record.getMessage()
    for key, value in published.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_a_head_under_another_name_is_told_of(tmp_path: Path) -> None:
    pair(tmp_path, "LongformerForQuestionAnswering")
    weights = load_file(tmp_path / "model.safetensors")
    weights["qa_output.weight"] = weights.pop("qa_outputs.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: qa_outputs.* 1 unexpected: qa_output\."):
        LongformerForQuestionAnswering.from_pretrained(tmp_path)


def test_led_without_its_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = LEDForConditionalGeneration(LEDConfig(vocab_size=50, **TINY))
    model.save_pretrained(tmp_path)
    ours = led.LEDModel.from_pretrained(tmp_path)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, model.led.state_dict()[name]), name
    with pytest.raises(TypeError, match="add_poling_layer"):
        led.LEDModel.from_pretrained(tmp_path, add_poling_layer=False)


def test_one_head_makes_room_for_another(tmp_path: Path) -> None:
    _, labels_3 = pair(tmp_path, "LongformerForSequenceClassification", num_labels=3)
    config = LongformerConfig.from_pretrained(tmp_path)
    config.num_labels = 5
    with pytest.raises(CheckpointError, match=r"out_proj\.bias is \[3\], the model needs \[5\]"):
        LongformerForSequenceClassification.from_pretrained(tmp_path, config=config)
    ours = LongformerForSequenceClassification.from_pretrained(
        tmp_path, config=config, allow_new_head=True
    )
    assert ours.classifier.out_proj.weight.shape == (5, 32)
    assert ours.classifier.out_proj.weight.std() > 0.1
    assert isinstance(labels_3, LongformerForSequenceClassification)
    assert torch.equal(ours.classifier.dense.weight, labels_3.classifier.dense.weight)
    masked = LongformerForMaskedLM.from_pretrained(tmp_path, allow_new_head=True)
    words = masked.longformer.embeddings.word_embeddings.weight
    assert torch.equal(words, labels_3.longformer.embeddings.word_embeddings.weight)
    assert masked.lm_head.decoder.weight is words


@pytest.mark.parametrize("headed", [False, True])
def test_the_base_model_itself_must_be_whole(tmp_path: Path, headed: bool) -> None:
    pair(tmp_path, "LongformerForMaskedLM" if headed else "LongformerModel")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    prefix = "longformer." if headed else ""
    lost = f"{prefix}encoder.layer.1.output.dense.bias"
    odd = f"{prefix}encoder.layer.9.output.dense.bias"
    misshapen = f"{prefix}embeddings.token_type_embeddings.weight"
    weights[odd] = weights.pop(lost)
    weights[misshapen] = weights[misshapen][:1].clone()
    save_file(weights, file)
    for cls in (LongformerModel, LongformerForMaskedLM, LongformerForSequenceClassification):
        with pytest.raises(CheckpointError, match=r"check that config\.json") as caught:
            cls.from_pretrained(tmp_path, allow_new_head=True)
        message = str(caught.value)
        assert "1 missing: longformer.encoder.layer.1.output.dense.bias" in message
        assert "1 unexpected: longformer.encoder.layer.9.output.dense.bias" in message
        assert "token_type_embeddings.weight is [1, 32], the model needs [2, 32]" in message


def test_a_pooler_beside_a_head_without_one_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair(tmp_path, "LongformerForMaskedLM")
    weights = load_file(tmp_path / "model.safetensors")
    weights["longformer.pooler.dense.weight"] = torch.ones(32, 32)
    weights["longformer.embeddings.position_ids"] = torch.arange(130)[None]
    save_file(weights, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        LongformerForMaskedLM.from_pretrained(tmp_path)
    assert not caplog.records


def test_an_led_without_a_head_lacks_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = transformers.LEDModel(transformers.LEDConfig(vocab_size=50, **TINY))
    published.save_pretrained(tmp_path)
    assert "shared.weight" in load_file(tmp_path / "model.safetensors")
    ours = LEDForConditionalGeneration.from_pretrained(tmp_path)
    for name, weight in published.state_dict().items():
        assert torch.equal(weight, ours.led.state_dict()[name]), name
    assert not ours.final_logits_bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_head_has_the_models_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    pair(tmp_path, "LongformerModel")
    ours = LongformerForMaskedLM.from_pretrained(tmp_path, dtype=dtype, allow_new_head=True)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert ours.lm_head.bias is ours.lm_head.decoder.bias
    assert ours.lm_head.decoder.weight is ours.longformer.embeddings.word_embeddings.weight


def test_a_revision_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only hub ids have revisions"):
        LongformerModel.from_pretrained(tmp_path, revision="v1")
    with pytest.raises(CheckpointError, match=r"nobody/nothing.* at revision 'v1'"):
        LongformerModel.from_pretrained("nobody/nothing", revision="v1")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, LONGFORMER_BASE) for name in ("LongformerModel", *HEADS)),
        ("LongformerModel", LONGFORMER_LARGE),
        ("LEDForConditionalGeneration", LED_BASE),
        ("LEDForConditionalGeneration", LED_LARGE),
    ],
)
def test_published_sizes_have_the_published_weights(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without memory there is nothing to draw, but torch takes seconds over it.
    monkeypatch.setattr(Tensor, "normal_", lambda self, *_args, **_kwargs: self)
    family, module = ("LED", led) if name.startswith("LED") else ("Longformer", longformer)
    with torch.device("meta"):
        published = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**options))
        config = (LEDConfig if family == "LED" else LongformerConfig)(**options)
        ours: PretrainedModel[Any] = getattr(module, name)(config)
    expected = {key: tensor.shape for key, tensor in published.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LongformerForMaskedLM", "LEDForConditionalGeneration"])
def test_a_full_size_model_survives_its_directory(tmp_path: Path, name: str) -> None:
    is_led = name.startswith("LED")
    torch.manual_seed(0)
    ours: PretrainedModel[Any]
    if is_led:
        ours = LEDForConditionalGeneration(LEDConfig(**LED_BASE))
    else:
        ours = LongformerForMaskedLM(LongformerConfig(**LONGFORMER_BASE))
    ours.save_pretrained(tmp_path)
    published, told = getattr(transformers, name).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = published.state_dict()
    again = type(ours).from_pretrained(tmp_path).state_dict()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs[key]), key
        assert torch.equal(value, again[key]), key


def test_models_can_be_pickled() -> None:
    for kind, config in BOTH:
        model = kind(config).eval()
        again = pickle.loads(pickle.dumps(model))
        ids = torch.tensor([[0, 7, 9, 11, 2]])
        assert torch.equal(again(ids).logits, model(ids).logits)
