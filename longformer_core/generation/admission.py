"""What documents may be decoded: each by itself, and how many at once in the memory there is."""

from collections.abc import Sequence

import torch

from longformer_core.attention.global_attention import Form
from longformer_core.config import LEDConfig
from longformer_core.errors import LongformerError, OutOfMemoryError, ShapeError, TooLongError
from longformer_core.generation.memory import encoding_numbers, row_numbers, source_numbers
from longformer_core.generation.request import Handle
from longformer_core.ops.chunking import most_rows
from longformer_core.ops.linear import widest_dtype


class Plan:
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

    def unfit(self, handle: Handle) -> LongformerError | None:
        """Return why a document cannot be decoded, if so: before anything is computed."""
        request, config = handle.request, self._config
        limit = config.max_encoder_position_embeddings
        if handle.num_tokens == 0:
            return ShapeError("the document has no tokens; give at least one")
        if handle.num_tokens > limit:
            return TooLongError(
                f"the document has {handle.num_tokens} tokens but the encoder has {limit} "
                "positions; shorten it or choose a model with more positions"
            )
        return (
            self._wrong_ids(request.input_ids) or self._wrong_marks(handle) or self._too_big(handle)
        )

    def _wrong_ids(self, input_ids: Sequence[int]) -> LongformerError | None:
        try:
            ids = torch.as_tensor(input_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            return ShapeError(f"the document's tokens are no whole numbers: {error}")
        if ids.dim() != 1 or ids.is_floating_point():
            return ShapeError(
                f"the document's tokens are a {ids.dim()}-dimensional tensor of {ids.dtype}; give "
                "one list of whole numbers"
            )
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= self._config.vocab_size:
            return ShapeError(
                f"the document's token ids reach from {least} to {most}; they must be from 0 to "
                f"{self._config.vocab_size - 1}"
            )
        return None

    def _wrong_marks(self, handle: Handle) -> LongformerError | None:
        request = handle.request
        positions = () if request.global_positions is None else request.global_positions
        if not all(0 <= position < handle.num_tokens for position in positions):
            return ShapeError(
                f"global_positions are {list(positions)} but the document has {handle.num_tokens} "
                "tokens, counted from 0"
            )
        if request.valid is not None and len(request.valid) != handle.num_tokens:
            return ShapeError(
                f"valid has {len(request.valid)} flags but the document has {handle.num_tokens} "
                "tokens; give one for each"
            )
        return None

    def _too_big(self, handle: Handle) -> LongformerError | None:
        fits = self.num_bytes([handle]) <= self.memory_bytes
        return None if fits else self.does_not_fit(handle)

    def num_bytes(self, pack: Sequence[Handle], decoding: Sequence[Handle] = ()) -> int:
        """Return what is needed beside the weights to encode a pack, and then hold it, at most.

        decoding: those that are held beside it.
        """
        config = self._config
        num_tokens = sum(handle.num_tokens for handle in pack)
        numbers = encoding_numbers(
            config.d_model, config.encoder_ffn_dim, num_tokens, self._most_rows
        )
        return numbers * self._encoding_dtype.itemsize + self.held_bytes([*decoding, *pack])

    def held_bytes(self, handles: Sequence[Handle]) -> int:
        """Return what documents take while they decode, at most.

        Those of one kind share a cache, which has room for its longest in all rows.
        """
        config = self._config
        longest: dict[tuple[int, bool], int] = {}
        numbers = 0
        for handle in handles:
            num_rows, num_steps = handle.num_rows, handle.num_steps
            longest[handle.kind] = max(num_steps, longest.get(handle.kind, 0))
            numbers += source_numbers(
                config, handle.num_tokens, num_rows * num_steps, form=self._form
            )
        for handle in handles:
            numbers += handle.num_rows * row_numbers(config, longest[handle.kind])
        return numbers * self._dtype.itemsize

    def does_not_fit(self, handle: Handle) -> OutOfMemoryError:
        """Return the error of a document that is too big even alone, with the figures in it."""
        return OutOfMemoryError(
            f"a document of {handle.num_tokens} tokens with {handle.num_rows} rows of up to "
            f"{handle.request.options.total_length - 1} tokens does not fit into memory even "
            f"alone: it needs about {self.num_bytes([handle]) / 1e9:.3g} GB beside the weights, of "
            f"{self.memory_bytes / 1e9:.3g} GB; shorten it, lower num_beams, or use a larger "
            "device"
        )
