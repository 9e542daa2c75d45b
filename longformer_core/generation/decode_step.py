"""One decoder step for all rows of a batch: kernel by kernel, or recorded once and replayed.

A step is some hundred small kernels, and on a GPU launching them takes longer than they do.
Shape letters: R rows, V vocabulary.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from longformer_core.attention.cross_attention import CrossAttentionCache
from longformer_core.generation.kv_cache import BeamKVCache

# Steps with the same documents and memory before one is recorded: documents that come and go every
# few steps would have more recorded than replayed.
_STEPS_BEFORE_RECORDING = 4

# Takes a function of nothing that returns logits; returns its replay, which writes into the same
# logits again. Recording does not run it.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


class StepModel(Protocol):
    """What a step asks of a model; see `models.led.LEDForConditionalGeneration`."""

    def decode_step(
        self, token_ids: Tensor, positions: Tensor, cache: BeamKVCache, source: CrossAttentionCache
    ) -> Tensor: ...


class DecodeStep:
    """Run steps; with `record`, replay a recorded one for as long as documents and memory stay.

    The cache needs fixed shapes then. What changes from step to step is in tensors that stay where
    they are: tokens and positions here, the rest in the cache.
    """

    def __init__(
        self,
        model: StepModel,
        cache: BeamKVCache,
        source: CrossAttentionCache,
        record: Record | None,
    ) -> None:
        self._model, self._cache, self._source, self._record = model, cache, source, record
        self.forget()

    def forget(self) -> None:
        """Drop the recorded step, because documents come or go."""
        self._num_same = 0
        self._replay: Callable[[], object] | None = None
        # Of the recorded step: they take part in it, and stay where they are.
        self._tokens = self._positions = self._logits = torch.empty(0)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits [R, V], which the next step may overwrite.

        Shapes: tokens, positions [R], see `decode_step`.
        """
        if self._record is None:
            return self._model.decode_step(tokens, positions, self._cache, self._source)
        if self._cache.is_full:
            # The memory moves.
            self.forget()
        self._num_same += 1
        if self._num_same <= _STEPS_BEFORE_RECORDING:
            return self._model.decode_step(tokens, positions, self._cache, self._source)
        if self._replay is None:
            self._tokens, self._positions = tokens.clone(), positions.to(tokens.device, copy=True)
            self._replay, self._logits = self._record(self._own_step)
        else:
            self._cache.count_step()
            self._tokens.copy_(tokens)
            self._positions.copy_(positions)
        self._replay()
        return self._logits

    def _own_step(self) -> Tensor:
        return self._model.decode_step(self._tokens, self._positions, self._cache, self._source)


def record_cuda_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Record the kernels of a step on the current CUDA device."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = step()
    return graph.replay, logits
