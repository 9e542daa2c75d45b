"""The language model on causal windows: nothing of the future, and that it learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longformer_core.config import LongformerCausalConfig
from longformer_core.errors import ConfigError, ShapeError
from longformer_core.models.longformer_causal import LongformerForCausalLM
from tests.bench import charlm
from tests.helpers import data_folder

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DILATIONS: dict[str, Any] = {"undilated": 1, "dilated": [1, 2, [1, 1, 3, 2]]}


def make(dilation: Any = 1, **changes: Any) -> LongformerForCausalLM:
    torch.manual_seed(0)
    config = LongformerCausalConfig(
        **TINY | {"attention_window": [4, 8, 16], "attention_dilation": dilation} | changes
    )
    return LongformerForCausalLM(config).eval()


def draw(*shape: int) -> Tensor:
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dilation", DILATIONS.values(), ids=DILATIONS)
@torch.no_grad()
def test_changing_a_byte_changes_no_logit_before_it(dilation: Any) -> None:
    model, ids = make(dilation), draw(1, 50)
    before = model(ids).logits
    for t in range(50):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 40
        after = model(changed).logits
        assert torch.equal(after[0, :t], before[0, :t])
        assert not torch.equal(after[0, t], before[0, t])


@pytest.mark.parametrize("dilation", [1, 2])
@torch.no_grad()
def test_a_layer_sees_so_many_keys_so_far_apart(dilation: int) -> None:
    model = make(dilation, num_hidden_layers=1, attention_window=6)
    ids = draw(1, 30)
    before = model(ids).logits[0, 20]
    seen = []
    for t in range(21):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 40
        if not torch.equal(model(changed).logits[0, 20], before):
            seen.append(t)
    assert seen == [20 - 3 * dilation, 20 - 2 * dilation, 20 - dilation, 20]


@torch.no_grad()
def test_a_shift_of_the_document_changes_nothing() -> None:
    """Positions count by distance."""
    model, ids = make(), draw(1, 60)
    whole, later = model(ids).logits, model(ids[:, 20:]).logits
    # Past three layers' windows nothing of the first 20 is left.
    torch.testing.assert_close(whole[:, 20 + 14 :], later[:, 14:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model, ids = make([1, 2, 1]), draw(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    out = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(out[0], model(ids[:1]).logits[0])
    torch.testing.assert_close(out[1, :13], model(ids[1:, :13]).logits[0])


def test_the_loss_is_of_the_next_tokens() -> None:
    model, ids = make(), draw(2, 20)
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    expected = functional.cross_entropy(
        torch.cat([out.logits[0, 4:-1], out.logits[1, :-1]]), torch.cat([ids[0, 5:], ids[1, 1:]])
    )
    torch.testing.assert_close(out.loss, expected)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with pytest.raises(ShapeError, match=r"row 1 has label .* at position 15"):
        model(ids, attention_mask=mask, labels=labels)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dilation", DILATIONS.values(), ids=DILATIONS)
def test_every_parameter_gets_a_gradient(dilation: Any, dropout: float) -> None:
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    model, ids = make(dilation, **dict.fromkeys(names, dropout)).train(), draw(2, 30)
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_are_those_of_differences() -> None:
    model, ids = make([1, 2, [1, 1, 3, 2]]).double(), draw(1, 12)

    def loss(table: Tensor) -> Tensor:
        weights = {"word_embeddings.weight": table, "lm_head.weight": table}
        out: Tensor = torch.func.functional_call(
            model, weights, (ids,), {"labels": ids}, tie_weights=False
        ).loss
        return out

    table = model.word_embeddings.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (table,), atol=1e-4, rtol=1e-2, fast_mode=True)


@torch.no_grad()
def test_a_directory_gives_the_same_model(tmp_path: Path) -> None:
    model, ids = make(DILATIONS["dilated"]), draw(2, 20)
    model.save_pretrained(tmp_path)
    again = LongformerForCausalLM.from_pretrained(tmp_path)
    for name in ("attention_window", "attention_dilation", "tie_word_embeddings"):
        assert getattr(again.config, name) == getattr(model.config, name)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.lm_head.weight is again.word_embeddings.weight


@torch.no_grad()
def test_another_size_of_the_vocabulary() -> None:
    model, ids = make(), draw(1, 20)
    before = model(ids).logits
    model.resize_token_embeddings(50)
    after = model(ids).logits
    assert after.shape == (1, 20, 50)
    torch.testing.assert_close(after[..., :40], before)


def test_the_schedule_of_the_paper() -> None:
    config = LongformerCausalConfig.with_schedule(
        smallest_window=32, largest_window=512, num_hidden_layers=12, num_attention_heads=8
    )
    assert config.radii == (16, 32, 64, 128, *[256] * 8)
    upper = [(*[1] * 6, each, each) for each in (2, 2, 3, 3, 4, 4)]
    assert config.dilations == ((1,) * 8,) * 6 + tuple(upper)
    plain = LongformerCausalConfig.with_schedule(is_dilated=False)
    assert plain.dilations == ((1,) * 12,) * 12


def test_dilations_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"\[1, 2\] for 3 layers of 4 heads"):
        make([1, 2])
    with pytest.raises(ConfigError, match="3 layers of 4 heads"):
        make([1, 2, [1, 2]])
    with pytest.raises(ConfigError, match="attention_dilation is 0"):
        make(0)
    with pytest.raises(ConfigError, match="odd share"):
        make(hidden_size=36)


def books() -> Tensor:
    folder = data_folder()
    assert folder is not None, "set LONGHAUL_TEST_DATA to the folder of the corpora"
    return charlm.read_bytes(folder)


@pytest.mark.slow
@pytest.mark.parametrize("is_dilated", [False, True], ids=["undilated", "dilated"])
def test_it_learns_books_byte_by_byte(is_dilated: bool) -> None:
    """Below 3 bits for each byte held back, within 15 CPU minutes."""
    lines = list(charlm.train(books(), 15, is_dilated=is_dilated, below=2.95))
    assert lines[-1]["held_back_bits_per_byte"] < 3.0
    assert lines[-1]["cpu_minutes"] <= 15.5
