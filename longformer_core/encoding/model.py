"""What an engine for encoders asks of a model.

Shape letters: B documents, S slots of a padded batch, T packed tokens, d hidden size, C labels or
vocabulary.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.layout import Layout

# What a head's logits are made of: a document's first token, or its last `</s>`; every token, for
# labels or for both ends of a span; tokens that somebody chooses.
HeadKind = Literal["first", "end", "tokens", "span", "masked"]


class Model(Protocol):
    """A Longformer or LED with a head, or without one; see `models`."""

    @property
    def config(self) -> LongformerConfig | LEDConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def head_kind(self) -> HeadKind | None: ...

    @property
    def max_source_tokens(self) -> int: ...

    @property
    def encode(self) -> Callable[..., Tensor]:
        """Ids [T] and layout, and where the model has any token types [T], to states [T, d]."""
        ...

    def default_global_mask(self, tokens: Tensor, /) -> Tensor:
        """Return which of ids [B, S] are global when nobody says it."""
        ...


class HeadModel(Model, Protocol):
    """A model with a head."""

    def head_logits(self, states: Tensor, /) -> Tensor:
        """Return logits [..., C] of states [..., d]."""
        ...


class ReadingModel(HeadModel, Protocol):
    """A model whose head is on a decoder that reads the document once more."""

    def decode_source(self, states: Tensor, layout: Layout, input_ids: Tensor, /) -> Tensor:
        """Return the decoder's states [T, d] by the encoder's [T, d]."""
        ...
