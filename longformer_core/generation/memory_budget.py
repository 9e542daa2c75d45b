"""What encoding and decoding documents takes beside the weights, and how much of it there is.

Shape letters: n source tokens of one document, m output tokens.
"""

from collections.abc import Sequence

import torch

from longformer_core.attention.global_attention import Form, is_cheaper_absorbed
from longformer_core.config import LEDConfig
from longformer_core.errors import OutOfMemoryError
from longformer_core.generation.request import Request
from longformer_core.ops.chunking import most_rows
from longformer_core.ops.linear import widest_dtype
from longformer_core.scheduling.memory import encoding_numbers

# Logits are held as such, as log-probabilities, and once more while these are made.
_LOGIT_COPIES = 3


class MemoryBudget:
    """What a model's documents need beside its weights, and what they may take."""

    def __init__(
        self,
        config: LEDConfig,
        dtype: torch.dtype,
        device: torch.device,
        form: Form,
        memory_bytes: int,
    ) -> None:
        """See `Engine`."""
        self._config, self._dtype, self._form = config, dtype, form
        self._encoding_dtype = widest_dtype(dtype, device)
        self._most_rows = most_rows(device)
        self.memory_bytes = memory_bytes

    def num_bytes(self, pack: Sequence[Request], decoding: Sequence[Request] = ()) -> int:
        """Return what is needed beside the weights to encode a pack, and then hold it, at most.

        decoding: those that are held beside it.
        """
        config = self._config
        num_tokens = sum(len(request.input_ids) for request in pack)
        numbers = encoding_numbers(
            config.d_model, config.encoder_ffn_dim, num_tokens, self._most_rows
        )
        return numbers * self._encoding_dtype.itemsize + self.held_bytes([*decoding, *pack])

    def held_bytes(self, requests: Sequence[Request]) -> int:
        """Return what documents take while they decode, at most.

        Those of one kind share a cache, which has room for its longest in all rows.
        """
        config = self._config
        longest: dict[tuple[int, bool], int] = {}
        numbers = 0
        for request in requests:
            kind, num_steps = request.kind, request.num_steps
            longest[kind] = max(num_steps, longest.get(kind, 0))
            numbers += source_numbers(
                config, len(request.input_ids), request.num_rows * num_steps, form=self._form
            )
        for request in requests:
            numbers += request.num_rows * row_numbers(config, longest[request.kind])
        return numbers * self._dtype.itemsize

    def does_not_fit(self, request: Request) -> OutOfMemoryError:
        """Return the error of a document that is too big even alone, with the figures in it."""
        return OutOfMemoryError(
            f"a document of {len(request.input_ids)} tokens with {request.num_rows} rows of up to "
            f"{request.num_steps} tokens does not fit into memory even alone: it needs about "
            f"{self.num_bytes([request]) / 1e9:.3g} GB beside the weights, of "
            f"{self.memory_bytes / 1e9:.3g} GB; shorten it, lower num_beams, or use a larger "
            "device"
        )


def decoding_numbers(
    config: LEDConfig,
    n: int,
    num_rows: int,
    m: int,
    *,
    form: Form = "auto",
    training: bool = False,
) -> int:
    """Return the numbers held to decode one document: its source, its own tokens, and logits.

    Units: `num_rows` rows of `m` tokens each. In training all of them are read at once.
    """
    source = source_numbers(config, n, num_rows * m, form=form)
    if not training:
        return source + num_rows * row_numbers(config, m)
    own = config.decoder_layers * (14 * config.d_model + 2 * config.decoder_ffn_dim)
    return source + num_rows * m * (own + config.vocab_size * _LOGIT_COPIES)


def source_numbers(config: LEDConfig, n: int, num_reads: int, *, form: Form = "auto") -> int:
    """Return the numbers held of a source that is read so many times, by rows times steps."""
    d, layers, heads = config.d_model, config.decoder_layers, config.decoder_attention_heads
    absorbed = form == "absorbed" or (
        form == "auto" and is_cheaper_absorbed(num_reads, n, heads, d)
    )
    return n * d * (2 if absorbed else 1 + 2 * layers)


def row_numbers(config: LEDConfig, m: int) -> int:
    """Return the numbers held of one row of up to m tokens that is generated, and its logits."""
    return m * 2 * config.d_model * config.decoder_layers + config.vocab_size * _LOGIT_COPIES
