"""LED against the published implementation: the same weights, the same numbers."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from longformer_core.config import LEDConfig
from longformer_core.errors import ConfigError, ShapeError, TooLongError
from longformer_core.layout import Layout
from longformer_core.models.led import LEDForConditionalGeneration
from tests.helpers import TINY, led_weights

VOCAB = 60
LENGTHS = (50, 1, 3, 130, 16, 0)
# First token; the only one; none; inside, at the edge of and past a window, and the last; all.
GLOBALS: tuple[list[int], ...] = ([0], [0], [], [5, 8, 16, 17, 129], list(range(16)), [])
CONFIG: dict[str, Any] = {
    **TINY,
    "vocab_size": VOCAB,
    "encoder_layers": 3,
    "attention_window": [8, 16, 4],
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


def make(dtype: torch.dtype = torch.float32, **options: Any) -> LEDForConditionalGeneration:
    config = LEDConfig(**{**CONFIG, **options})
    with torch.device("meta"):
        model = LEDForConditionalGeneration(config)
    model = model.to_empty(device="cpu").to(dtype).eval()
    weights = led_weights(config, seed=3)
    shared = weights["led.shared.weight"]
    names = ("led.encoder.embed_tokens.weight", "led.decoder.embed_tokens.weight", "lm_head.weight")
    model.load_state_dict({**dict.fromkeys(names, shared), **weights})
    return model


def make_published(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**CONFIG))
    model.load_state_dict(make().state_dict())
    return model.to(dtype).eval()


def documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (n,), generator=generator) for n in lengths]


def forced_logits(
    model: LEDForConditionalGeneration, states: Tensor, layout: Layout, forced: Tensor
) -> Tensor:
    """Feed `forced` [B, rows, steps] step by step and return the logits [B, rows, steps, V]."""
    num_documents, num_rows, num_steps = forced.shape
    source = model.source(states, layout)
    cache = model.new_cache(num_documents, num_rows)
    steps = [
        model.decode_step(
            forced[:, :, step].flatten(),
            torch.full((num_documents * num_rows,), step),
            cache,
            source,
        )
        for step in range(num_steps)
    ]
    return torch.stack(steps, 1).view(num_documents, num_rows, num_steps, VOCAB)


@torch.no_grad()
def test_packed_documents_equal_the_published_model_one_by_one() -> None:
    model, published = make(), make_published()
    texts = documents()
    layout = Layout.from_lengths(LENGTHS, GLOBALS)
    forced = torch.randint(4, VOCAB, (len(LENGTHS), 2, 20))

    states = model.encode(torch.cat(texts), layout)
    logits = forced_logits(model, states, layout, forced)

    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    for i, (text, positions) in enumerate(zip(texts, GLOBALS, strict=True)):
        if not len(text):
            continue
        is_global = torch.zeros(1, len(text), dtype=torch.int64)
        is_global[0, positions] = 1
        theirs = published(
            text.expand(2, -1),
            decoder_input_ids=forced[i],
            global_attention_mask=is_global.expand(2, -1),
        )
        mine = states[layout.cu_seqlens[i] : layout.cu_seqlens[i + 1]]
        torch.testing.assert_close(mine, theirs.encoder_last_hidden_state[0], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(logits[i], theirs.logits, rtol=1e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("masked_by", ["attention_mask", "global_attention_mask"])
def test_masked_tokens_equal_the_published_model(masked_by: str) -> None:
    """A token masked by a global mask of -1 is no key of the encoder, but the decoder sees it."""
    model, published = make(), make_published()
    length = 70
    text = documents((length,))[0]
    keep = torch.rand(length, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[20:45] = False
    positions = [3, 30, 50, 69]
    is_global = torch.zeros(length, dtype=torch.int64)
    is_global[positions] = 1
    forced = torch.randint(4, VOCAB, (1, 1, 6))
    if masked_by == "attention_mask":
        layout = Layout.from_lengths([length], [positions], keep)
        attention_mask = keep.long()
    else:
        layout = Layout.from_lengths([length], [positions], keep, torch.ones(length))
        is_global[~keep] = -1
        attention_mask = torch.ones(length, dtype=torch.int64)

    states = model.encode(text, layout)
    logits = forced_logits(model, states, layout, forced)

    theirs = published(
        text[None],
        attention_mask=attention_mask[None],
        global_attention_mask=is_global[None],
        decoder_input_ids=forced[0],
    )
    torch.testing.assert_close(states, theirs.encoder_last_hidden_state[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(logits[0], theirs.logits, rtol=1e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_err_no_more_than_the_published_model(dtype: torch.dtype) -> None:
    text = documents((130,))[0]
    layout = Layout.from_lengths([130], [[0]])
    is_global = torch.zeros(1, 130, dtype=torch.int64)
    is_global[0, 0] = 1
    exact = make(torch.float64).encode(text, layout)
    theirs = make_published(dtype).led.encoder(text[None], global_attention_mask=is_global)

    states = make(dtype).encode(text, layout)

    limit = 2 * (theirs.last_hidden_state[0].double() - exact).abs().max()
    assert states.dtype == dtype
    assert (states.double() - exact).abs().max() <= limit + 1e-6 * exact.abs().max()


@torch.no_grad()
def test_half_precision_infinities_are_clamped_as_published() -> None:
    model = make(torch.float16)
    norm = model.led.encoder.layers[0].final_layer_norm
    norm.weight.fill_(60000.0)

    states = model.led.encoder.layers[0](torch.randn(20, 32).half(), Layout.from_lengths([20]))

    assert states.isfinite().all()
    assert states.abs().max() == torch.tensor(torch.finfo(torch.float16).max - 1000).half()


@torch.no_grad()
def test_a_document_does_not_depend_on_its_batch() -> None:
    model = make()
    texts = documents()
    forced = torch.randint(4, VOCAB, (len(LENGTHS), 2, 4))
    layout = Layout.from_lengths(LENGTHS, GLOBALS)
    states = model.encode(torch.cat(texts), layout)
    together = forced_logits(model, states, layout, forced)
    for i, (text, positions) in enumerate(zip(texts, GLOBALS, strict=True)):
        layout = Layout.from_lengths([len(text)], [positions])
        alone = forced_logits(model, model.encode(text, layout), layout, forced[i : i + 1])
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_source_changes_the_logits() -> None:
    model = make()
    layout = Layout.from_lengths([40, 40], [[0], [0]])
    states = model.encode(torch.cat(documents((40, 40))), layout)

    one, other = forced_logits(model, states, layout, torch.full((2, 1, 3), 7))

    assert (one - other).abs().max() > 0.5


@torch.no_grad()
def test_documents_at_different_steps_give_what_they_give_alone() -> None:
    model = make()
    layout = Layout.from_lengths([30, 20], [[0], [0]])
    states = model.encode(torch.cat(documents((30, 20))), layout)
    forced = torch.randint(4, VOCAB, (2, 1, 8))
    expected = forced_logits(model, states, layout, forced)
    first, second = (
        model.source(part, Layout.from_lengths([len(part)])) for part in states.split([30, 20])
    )
    cache = model.new_cache(1)
    model.decode_step(forced[:1, 0, 0], torch.tensor([0]), cache, first)
    model.decode_step(forced[:1, 0, 1], torch.tensor([1]), cache, first)
    # The second document begins while the first goes on.
    first.extend(second)
    cache.add([6])
    for step in range(2, 8):
        positions = torch.tensor([step, step - 2])
        tokens = forced[[0, 1], 0, positions]

        logits = model.decode_step(tokens, positions, cache, first)

        torch.testing.assert_close(logits, expected[[0, 1], 0, positions], rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_encoder_weight_that_was_used() -> None:
    model = make()
    layout = Layout.from_lengths([40], [[0, 39]])

    model.encode(documents((40,))[0], layout).square().sum().backward()

    unused = {
        name
        for name, parameter in model.led.encoder.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    }
    # A key bias adds the same to every score of a row, so its gradient is zero but for rounding.
    assert {name for name in unused if "key" not in name} == set()


def test_parameters_have_their_published_names() -> None:
    ours, theirs = make().state_dict(), make_published().state_dict()

    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_initial_weights_are_drawn_as_published() -> None:
    torch.manual_seed(0)
    model = LEDForConditionalGeneration(LEDConfig(**{**CONFIG, "d_model": 64, "init_std": 0.05}))
    again = LEDForConditionalGeneration(model.config)

    layer = model.led.encoder.layers[0]
    assert layer.fc1.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert layer.fc1.bias.abs().sum() == 0
    assert model.led.shared.weight[1].abs().sum() == 0
    assert model.led.encoder.embed_positions.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert torch.equal(layer.final_layer_norm.weight, torch.ones(64))
    assert model.lm_head.weight is model.led.encoder.embed_tokens.weight
    assert not torch.equal(layer.fc1.weight, again.led.encoder.layers[0].fc1.weight)


def test_untied_embeddings_are_separate() -> None:
    model = LEDForConditionalGeneration(LEDConfig(**CONFIG, tie_word_embeddings=False))

    weights = {
        id(w)
        for w in (
            model.lm_head.weight,
            model.led.shared.weight,
            model.led.encoder.embed_tokens.weight,
            model.led.decoder.embed_tokens.weight,
        )
    }
    assert len(weights) == 4


def test_what_does_not_fit_is_named() -> None:
    model = make(max_encoder_position_embeddings=30, max_decoder_position_embeddings=20)
    ids = torch.zeros(31, dtype=torch.int64)

    with pytest.raises(TooLongError, match=r"document 1 has 31 tokens .* 30 positions"):
        model.encode(ids, Layout.from_lengths([0, 31]))
    with pytest.raises(ShapeError, match="describes 30 packed tokens"):
        model.encode(ids, Layout.from_lengths([30]))
    with pytest.raises(ShapeError, match=r"reach from 0 to 60 .* ids 0 to 59"):
        model.encode(torch.tensor([0, 60]), Layout.from_lengths([2]))
    layout = Layout.from_lengths([3])
    source = model.source(model.encode(ids[:3], layout), layout)
    with pytest.raises(TooLongError, match=r"position 20 but the decoder has 20"):
        model.decode_step(ids[:1], torch.tensor([20]), model.new_cache(1), source)
    with pytest.raises(ShapeError, match="2 rows step but the cache holds 1"):
        model.decode_step(ids[:2], torch.tensor([0, 0]), model.new_cache(1), source)
    with pytest.raises(ConfigError, match=r"no activation function 'gelo' .*'gelu'"):
        make(activation_function="gelo")
