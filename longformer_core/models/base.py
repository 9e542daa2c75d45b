"""What all models share: initial weights, reading and writing model directories."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from longformer_core.checkpoint import load_into, read_state_dict, resolve, write_state_dict
from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.errors import ConfigError, ShapeError, did_you_mean

_Config = TypeVar("_Config", LEDConfig, LongformerConfig)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation function of a published name.

    Raises: ConfigError for a name that is not known.
    """
    if name not in _ACTIVATIONS:
        raise ConfigError(
            f"there is no activation function {name!r}{did_you_mean(name, _ACTIVATIONS)}; "
            f"choose one of {sorted(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


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


class PretrainedModel(nn.Module, Generic[_Config]):
    """A model that lives in a directory: `config.json` and weights under their published names."""

    config_class: type[_Config]
    # State-dict names that a published checkpoint may lack; they are zeros then.
    _optional_weights: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: _Config) -> None:
        """Keep the config; subclasses build their modules and then call `init_weights`."""
        super().__init__()
        self.config: _Config = config

    @property
    def device(self) -> torch.device:
        """Return where the weights live."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        config: _Config | None = None,
        revision: str | None = None,
        allow_new_head: bool = False,
    ) -> Self:
        """Load a model for inference from a directory, a hub id or a URL (see `resolve`).

        The weights may be those of the model with another head or without one: the parts that both
        have are taken.
        config: used instead of the directory's, for instance with another `num_labels`.
        revision: a branch, tag or commit of a hub id.
        allow_new_head: draw what the weights lack outside the base model as `init_weights` does,
            and leave out what of them has no place in this class; a warning in the log names both.
        Raises: ConfigError, CheckpointError when config or weights are missing or do not fit.
        """
        path = resolve(directory, revision=revision)
        # On the meta device nothing is drawn or copied before the real weights arrive.
        with torch.device("meta"):
            model = cls(config or cls.config_class.from_pretrained(path)).to(dtype)
        load_into(
            model,
            read_state_dict(path),
            optional=cls._optional_weights,
            # Published classes name the model without its head after the family.
            base=cls.config_class.model_type,
            draw=model._drawn if allow_new_head else None,
        )
        return model.to(device).eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, readable by transformers as well."""
        dtype = str(self.dtype).removeprefix("torch.")
        self.config.save_pretrained(directory, architecture=type(self).__name__, dtype=dtype)
        write_state_dict(self, directory)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw weights as published: normal, with zero biases and zero padding rows."""
        if self.device.type == "meta":
            return  # nothing to draw into; torch would take seconds over it
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # After all draws: a tied output projection draws the same weight again.
        for module in self.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()

    def _drawn(self, name: str) -> Tensor:
        """Return a fresh value, on the CPU, of a head's weight as `init_weights` draws it."""
        owner, _, leaf = name.rpartition(".")
        module = self.get_submodule(owner)
        value = torch.zeros(getattr(module, leaf).shape)
        if leaf == "weight" and isinstance(module, nn.Linear):
            nn.init.normal_(value, std=self.config.initializer_range)
        elif leaf == "weight":
            nn.init.ones_(value)
        return value
