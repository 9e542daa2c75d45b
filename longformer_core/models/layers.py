"""What the layers of both models share: activation functions and stacks."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from longformer_core.errors import ConfigError, ShapeError, TooLongError, did_you_mean
from longformer_core.layout import Layout

# Each with the form that overwrites its input.
_Function = Callable[[Tensor], Tensor]


_GELU_BY_TANH = (
    partial(functional.gelu, approximate="tanh"),
    partial(torch.ops.aten.gelu_, approximate="tanh"),
)


_SILU = (functional.silu, partial(functional.silu, inplace=True))


_ACTIVATIONS: dict[str, tuple[_Function, _Function]] = {
    "gelu": (functional.gelu, torch.ops.aten.gelu_),
    "gelu_new": _GELU_BY_TANH,
    "gelu_pytorch_tanh": _GELU_BY_TANH,
    "relu": (functional.relu, torch.relu_),
    "silu": _SILU,
    "swish": _SILU,
    "tanh": (torch.tanh, torch.tanh_),
}


def activation(name: str) -> _Function:
    """Return the activation function of a published name, for a tensor that nobody else reads.

    Where no gradient wants the input, it is overwritten: the feed-forward's inner states are the
    largest of a layer, and fresh memory for them costs a few percent of an encoder on CPUs.
    Raises: ConfigError for a name that is not known.
    """
    if name not in _ACTIVATIONS:
        raise ConfigError(
            f"there is no activation function {name!r}{did_you_mean(name, _ACTIVATIONS)}; "
            f"choose one of {sorted(_ACTIVATIONS)}"
        )
    return _Activation(name)


@dataclasses.dataclass(frozen=True)
class _Activation:
    """By name, so that a model can be pickled."""

    name: str

    def __call__(self, states: Tensor) -> Tensor:
        fresh, overwriting = _ACTIVATIONS[self.name]
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and states.requires_grad):
            return fresh(states)
        return overwriting(states)


def check_ids(name: str, ids: Tensor, limit: int) -> None:
    """Raise ShapeError unless all ids are rows 0 to limit - 1 of an embedding; empty is fine.

    On a GPU an id outside would end the process.
    """
    if not ids.numel():
        return
    low, high = (int(bound) for bound in torch.stack(ids.aminmax()).tolist())
    if low < 0 or high >= limit:
        raise ShapeError(
            f"{name} reach from {low} to {high} but the model has only ids 0 to {limit - 1}; use "
            "the tokenizer of this model's directory"
        )


def check_packed_ids(input_ids: Tensor, layout: Layout, vocab_size: int) -> None:
    """Raise ShapeError unless there is one id of the vocabulary for each token of the layout."""
    if input_ids.shape != (layout.num_tokens,):
        raise ShapeError(
            f"input_ids have shape {list(input_ids.shape)} but the layout describes "
            f"{layout.num_tokens} packed tokens; give one id per token, documents end to end"
        )
    check_ids("input_ids", input_ids, vocab_size)


def check_lengths(layout: Layout, limit: int) -> None:
    """Raise TooLongError for a document with more tokens than the encoder has positions."""
    for document, length in enumerate(layout.lengths):
        if length > limit:
            raise TooLongError(
                f"document {document} has {length} tokens but the encoder has {limit} positions; "
                "shorten the document or choose a model with more positions"
            )


class LayerStack(nn.Module):
    """Layers that run one after another."""

    gradient_checkpointing = False

    def __init__(self, layerdrop: float = 0.0) -> None:
        """Skip each layer with this probability, in training."""
        super().__init__()
        self.layerdrop = layerdrop

    def run(
        self, layers: nn.ModuleList, states: Tensor, every: list[Tensor] | None, *given: Any
    ) -> Tensor:
        """Return the states after all layers; the list gets those before and after each."""
        for layer in layers:
            if every is not None:
                every.append(states)
            states = self._run_one(layer, states, *given)
        if every is not None:
            every.append(states)
        return states

    def _run_one(self, layer: nn.Module, states: Tensor, *given: Any) -> Tensor:
        if self.training and self.layerdrop and float(torch.rand(())) < self.layerdrop:
            return states
        if self.training and self.gradient_checkpointing:
            out: Tensor = checkpoint(layer, states, *given, use_reentrant=False)
        else:
            out = layer(states, *given)
        return out
