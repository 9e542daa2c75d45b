"""How much memory and arithmetic a batch costs, before anything is loaded.

Shape letters: T packed tokens, n tokens of one document, g global ones, d hidden size, f
feed-forward size, r radius, m output tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from longformer_core.attention.global_attention import form_costs
from longformer_core.checkpoints.meta_init import meta_init
from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.errors import ConfigError
from longformer_core.generation.memory_budget import decoding_numbers
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.models.longformer import LongformerModel
from longformer_core.ops.chunking import most_rows
from longformer_core.scheduling.memory import encoding_numbers

# A backward pass multiplies twice where the forward multiplied once; that of the attention
# computes the scores anew first.
_TRAINING_FLOPS = 3
_TRAINING_ATTENTION_FLOPS = 3.5
# The weights themselves, their gradients, and the two moments of AdamW.
_TRAINING_WEIGHTS = 4


@dataclass(frozen=True)
class Estimate:
    """What one batch takes.

    weights_bytes: the parameters and buffers of the model, exactly. activation_bytes: the most that
    is alive at once beside weights, gradients and optimizer. peak_bytes: all of it, in training
    with gradients and AdamW's moments in the dtype of the weights. flops: of matrix products, a
    multiply-add counted as two.
    """

    weights_bytes: int
    activation_bytes: int
    peak_bytes: int
    flops: int


@dataclass(frozen=True)
class _Sizes:
    """The encoder in the letters of this file."""

    d: int
    f: int
    heads: int
    radii: tuple[int, ...]


def estimate_cost(
    config: LongformerConfig | LEDConfig,
    lengths: Sequence[int],
    *,
    training: bool = False,
    dtype: torch.dtype = torch.float32,
    num_globals: int = 1,
    output_length: int = 0,
    num_beams: int = 1,
) -> Estimate:
    """Estimate a batch of documents of these lengths, packed: padding costs nothing.

    For a LongformerConfig the model without a head; for an LEDConfig the model that writes
    `output_length` tokens per document with `num_beams` beams, or, in training, reads them.

    Flops, forward, per encoder layer: projections and feed-forward 2 T (4 d^2 + 2 d f); window and
        global columns 4 d times the pairs of query and key that see each other; global rows the
        cheaper of projected and absorbed keys (see `global_attention`). Per output token and
        decoder layer 2 (6 d^2 + 2 d f) + 4 d (m / 2) and the cheaper form of cross-attention, and
        2 d V for the logits. Training counts three times the forward, of the window three and a
        half times.
    Bytes: in inference the encoder's widest point, 7 T d numbers, or 5 T d and 2 d + f for each of
        the T or 2048 rows that go through the feed-forward at once; or what decoding holds. In
        training T (7 d + 2 f) kept per layer.
    Accuracy: blocked attention computes whole blocks, up to (128 + 2 r) / (2 r + 1) times the
        window's pairs, in inference and up to r = 128 only (32 + 2 r) / (2 r + 1) times. With
        f = 4 d and d = 256 torch counts 0.99 to 1.08 times these flops, and the peak of what lives
        beside the weights is 0.8 to 1.4 times these bytes (CPU, float32). Training of LED's
        decoder, and gradient checkpointing, are not measured. Encoding in bfloat16 on CPUs without
        AMX takes the bytes of float32 where our kernels do not run (see `ops.linear.widest_dtype`).
    Units: num_globals per document.
    Raises: ConfigError for numbers below 0, for more beams or outputs than make sense, and for
        outputs of a model that writes none.
    """
    _check(config, lengths, num_globals, output_length, num_beams)
    weights = _weights_bytes(config, dtype)
    sizes = _sizes(config)
    num_tokens = sum(lengths)
    at_once = num_tokens if training else most_rows(torch.device("cpu"))
    working = encoding_numbers(sizes.d, sizes.f, num_tokens, at_once)
    kept = num_tokens * len(sizes.radii) * (7 * sizes.d + 2 * sizes.f)
    flops = sum(_encoder_flops(sizes, n, min(num_globals, n), training) for n in lengths)
    decoding = 0
    if isinstance(config, LEDConfig) and output_length:
        written = sum(_decoder_flops(config, n, output_length, num_beams) for n in lengths)
        flops += written * (_TRAINING_FLOPS if training else 1)
        decoding = sum(
            decoding_numbers(config, n, num_beams, output_length, training=training)
            for n in lengths
        )
    numbers = kept + working + decoding if training else max(working, decoding)
    activations = numbers * dtype.itemsize
    return Estimate(
        weights_bytes=weights,
        activation_bytes=activations,
        peak_bytes=weights * (_TRAINING_WEIGHTS if training else 1) + activations,
        flops=flops,
    )


def _check(
    config: LongformerConfig | LEDConfig,
    lengths: Sequence[int],
    num_globals: int,
    output_length: int,
    num_beams: int,
) -> None:
    smallest = {"lengths": 0, "num_globals": 0, "output_length": 0, "num_beams": 1}
    given = {
        "lengths": min(lengths, default=0),
        "num_globals": num_globals,
        "output_length": output_length,
        "num_beams": num_beams,
    }
    for name, value in given.items():
        if value < smallest[name]:
            raise ConfigError(f"{name} {value} is too small; the least is {smallest[name]}")
    if output_length and not isinstance(config, LEDConfig):
        raise ConfigError(f"output_length is {output_length} but Longformer writes no text; give 0")


def _weights_bytes(config: LongformerConfig | LEDConfig, dtype: torch.dtype) -> int:
    """Count the model's own tensors, each once; on the meta device they take no memory."""
    model: torch.nn.Module
    with meta_init():
        if isinstance(config, LEDConfig):
            model = LEDForConditionalGeneration(config)
        else:
            model = LongformerModel(config)
    return dtype.itemsize * sum(t.numel() for t in (*model.parameters(), *model.buffers()))


def _sizes(config: LongformerConfig | LEDConfig) -> _Sizes:
    return _Sizes(
        d=config.hidden_size,
        f=config.encoder_ffn_dim if isinstance(config, LEDConfig) else config.intermediate_size,
        heads=config.num_attention_heads,
        radii=config.radii,
    )


def _encoder_flops(sizes: _Sizes, n: int, g: int, training: bool) -> int:
    """Return the flops for one document."""
    d, f = sizes.d, sizes.f
    linear = 2 * n * (4 * d * d + 2 * d * f) + _global_rows_flops(sizes, n, g)
    pairs = sum(_window_pairs(n, r) + g * max(0, n - 2 * r - 1) for r in sizes.radii)
    if training:
        linear *= _TRAINING_FLOPS
        return linear * len(sizes.radii) + round(4 * d * pairs * _TRAINING_ATTENTION_FLOPS)
    return linear * len(sizes.radii) + 4 * d * pairs


def _window_pairs(n: int, r: int) -> int:
    """Return how many pairs of tokens of a document are at most r apart, each with itself too."""
    reach = min(r, n - 1) if n else 0
    return n + reach * (2 * n - reach - 1)


def _global_rows_flops(sizes: _Sizes, n: int, g: int) -> int:
    return 2 * g * sizes.d**2 + min(form_costs(g, n, sizes.heads, sizes.d))


def _decoder_flops(config: LEDConfig, n: int, m: int, num_beams: int) -> int:
    """Return the forward's flops for the outputs of one document of n tokens."""
    d, f = config.d_model, config.decoder_ffn_dim
    per_token = 2 * (6 * d * d + 2 * d * f)
    per_row = m * per_token + 4 * d * sum(accumulate([1] * m))
    cross = min(form_costs(num_beams * m, n, config.decoder_attention_heads, d))
    layers = config.decoder_layers * (num_beams * per_row + cross)
    return layers + num_beams * m * 2 * d * config.vocab_size
