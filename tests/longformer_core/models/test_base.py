from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.errors import ConfigError
from longformer_core.layout import Layout
from longformer_core.models.base import activation
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.models.longformer import LongformerForMaskedLM
from tests.helpers import TINY

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
    x = torch.linspace(-3, 3, 50)

    for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh"):
        theirs = transformers.activations.ACT2FN[name](x)
        torch.testing.assert_close(activation(name)(x), theirs)
    assert not torch.equal(activation("gelu_new")(x), functional.gelu(x))
