"""Estimates against what the models really multiply and hold."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.errors import ConfigError
from longformer_core.estimate import estimate_cost
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.memory_budget import MemoryBudget
from longformer_core.generation.request import Request
from longformer_core.layout import Layout
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.models.longformer import LongformerModel
from longformer_core.ops import linear
from tests.helpers import without_kernels

SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 1500,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class PeakBytes(TorchDispatchMode):
    """The most bytes of new tensors that are alive at once, by their storages' own lifetimes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in model.state_dict().values()}

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.live -= num_bytes


def measured(model: nn.Module, call: Callable[[], Any]) -> tuple[int, int]:
    """Return the flops that torch counts, and the peak bytes of a call."""
    # Torch has no formula for its attention on CPUs.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter as flops, PeakBytes(model) as memory:
        call()
    return flops.get_total_flops(), memory.peak


def longformer(**options: Any) -> LongformerModel:
    return LongformerModel(LongformerConfig(**SIZES | options), add_pooling_layer=False)


def batch(lengths: Sequence[int], num_globals: int) -> dict[str, Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.where(mask, 5, 1)
    marks = torch.zeros_like(ids)
    marks[:, :num_globals] = 1
    return {"input_ids": ids, "attention_mask": mask, "global_attention_mask": marks}


@pytest.mark.parametrize(
    "config",
    [
        LongformerConfig(**SIZES),
        LEDConfig(vocab_size=300, d_model=64, encoder_layers=1, decoder_layers=2),
        LEDConfig(vocab_size=300, d_model=64, decoder_layers=1, tie_word_embeddings=False),
    ],
    ids=["longformer", "led", "untied"],
)
def test_weights_are_exact(config: LongformerConfig | LEDConfig) -> None:
    kind = LEDForConditionalGeneration if isinstance(config, LEDConfig) else LongformerModel
    model: nn.Module = kind(config).to(torch.bfloat16)  # type: ignore[arg-type]
    tensors = {id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}
    found = estimate_cost(config, [100], dtype=torch.bfloat16)
    assert found.weights_bytes == sum(tensors.values())
    assert found.peak_bytes == found.weights_bytes + found.activation_bytes


@pytest.mark.parametrize("lengths", [[200], [128, 1, 60]])
def test_flops_are_exact_where_one_block_holds_a_document(lengths: list[int]) -> None:
    model = longformer(attention_window=512)
    with torch.no_grad():
        for row in lengths:
            flops, _ = measured(model, lambda row=row: model(**batch([row], 0)))  # type: ignore[misc]
            assert flops == estimate_cost(model.config, [row], num_globals=0).flops
    each = [estimate_cost(model.config, [n]).flops for n in lengths]
    assert estimate_cost(model.config, lengths).flops == sum(each)


@pytest.mark.parametrize("num_globals", [1, 90])
@pytest.mark.parametrize("window", [32, 256])
@pytest.mark.parametrize("training", [False, True])
def test_flops_and_activations(num_globals: int, window: int, training: bool) -> None:
    model = longformer(attention_window=window)
    inputs = batch([400, 270], num_globals)

    def run() -> None:
        with torch.set_grad_enabled(training):
            states = model(**inputs).last_hidden_state
        if training:
            states.sum().backward()

    flops, peak = measured(model, run)
    found = estimate_cost(model.config, [400, 270], num_globals=num_globals, training=training)
    assert 0.99 <= flops / found.flops <= 1.1
    gradients = found.weights_bytes if training else 0
    assert 0.7 <= peak / (found.activation_bytes + gradients) <= 1.5


@pytest.mark.parametrize("length", [1024, 2048, 2600, 4000])
def test_activations_of_more_rows_than_the_feed_forward_takes_at_once(length: int) -> None:
    model = longformer(attention_window=32, max_position_embeddings=4100)
    with torch.no_grad():
        _, peak = measured(model, lambda: model(**batch([length], 1)))
    assert 0.8 <= peak / estimate_cost(model.config, [length]).activation_bytes <= 1.2


@torch.no_grad()
@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("is_slow", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_plans_what_encoding_takes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_slow: bool, has_kernels: bool
) -> None:
    monkeypatch.setattr(linear, "multiplies_bfloat16_slowly", lambda: is_slow)
    if not has_kernels:
        without_kernels(monkeypatch)
    shape = {"d_model": 256, "encoder_layers": 2, "encoder_ffn_dim": 1024, "decoder_layers": 1}
    config = LEDConfig(vocab_size=200, attention_window=64, **shape)
    model = LEDForConditionalGeneration(config).eval().to(dtype)
    encoder, document = model.get_encoder(), [5] * 3000
    layout = Layout.from_lengths([len(document)], [[0]])
    words = encoder.embed_tokens(torch.tensor(document))
    _, peak = measured(model, lambda: encoder(words, layout.positions, layout))
    budget = MemoryBudget(model.config, dtype, model.device, "auto", 2**40)
    request = Request(document, GenerationConfig())
    planned = budget.num_bytes([request]) - budget.held_bytes([request])
    assert 0.7 <= peak / planned <= 1.2


@pytest.mark.parametrize("num_beams", [1, 3])
def test_writing(num_beams: int) -> None:
    config = LEDConfig(
        vocab_size=400,
        d_model=128,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=256,
        attention_window=128,
        max_decoder_position_embeddings=64,
    )
    model = LEDForConditionalGeneration(config).eval()
    lengths, steps = [400, 390], 16
    ids = torch.full((sum(lengths),), 5)
    rows = num_beams * len(lengths)

    def run() -> None:
        layout = Layout.from_lengths(lengths, [[0], [0]])
        states = model.encode(ids, layout)
        source = model.source(states, layout, num_rows=num_beams * steps)
        cache = model.new_cache(len(lengths), num_beams)
        for step in range(steps):
            tokens = torch.full((rows,), 7)
            model.decode_step(tokens, torch.full((rows,), step), cache, source)

    with torch.no_grad():
        flops, peak = measured(model, run)
    found = estimate_cost(config, lengths, output_length=steps, num_beams=num_beams)
    assert 0.99 <= flops / found.flops <= 1.1
    assert 0.7 <= peak / found.activation_bytes <= 1.5


def test_cost_grows_with_the_window_and_not_with_its_square() -> None:
    short, long = ([n] for n in (4096, 8192))
    config = LongformerConfig(**SIZES | {"attention_window": 512})
    ratio = estimate_cost(config, long).flops / estimate_cost(config, short).flops
    assert 2.0 <= ratio < 2.05
    wide = LongformerConfig(**SIZES | {"attention_window": 1024})
    added = estimate_cost(wide, long).flops - estimate_cost(config, long).flops
    assert added / estimate_cost(config, long).flops < 0.6


@pytest.mark.parametrize(
    ("lengths", "options", "words"),
    [
        ([3, -1], {}, "lengths -1 is too small"),
        ([3], {"num_globals": -1}, "num_globals -1"),
        ([3], {"num_beams": 0}, "num_beams 0 is too small; the least is 1"),
        ([3], {"output_length": 9}, "output_length is 9 but Longformer writes no text"),
    ],
)
def test_wrong_numbers_are_named(lengths: list[int], options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        estimate_cost(LongformerConfig(**SIZES), lengths, **options)  # type: ignore[arg-type]
