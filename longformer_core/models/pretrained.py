"""What all models share: initial weights, reading and writing directories, stacks of layers."""

import dataclasses
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from longformer_core.checkpoints.meta_init import meta_init
from longformer_core.checkpoints.weights import (
    load_into,
    read_state_dict,
    resolve,
    write_state_dict,
)
from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.errors import ConfigError, did_you_mean
from longformer_core.models.layers import LayerStack

_Config = TypeVar("_Config", LEDConfig, LongformerConfig)


# Ends of the state-dict names whose tensors have one entry per token of the vocabulary.
_VOCABULARY_WEIGHTS = (
    "word_embeddings.weight",
    "shared.weight",
    "embed_tokens.weight",
    "lm_head.weight",
    "lm_head.bias",
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
    "final_logits_bias",
)


class PretrainedModel(nn.Module, Generic[_Config]):
    """A model that lives in a directory: `config.json` and weights under their published names.

    Every call takes `return_dict=False`, which returns the output's fields as a tuple.
    """

    config_class: type[_Config]
    _forward_names: ClassVar[frozenset[str]]
    # State-dict names that a published checkpoint may lack; they are zeros then.
    _optional_weights: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: _Config) -> None:
        """Keep the config; subclasses build their modules and then call `init_weights`."""
        super().__init__()
        self.config: _Config = config

    def __init_subclass__(cls, **options: Any) -> None:
        """Note the names of `forward`, to help with those that it does not have."""
        super().__init_subclass__(**options)
        cls._forward_names = frozenset(inspect.signature(cls.forward).parameters) - {"self"}

    def __call__(self, *args: Any, return_dict: bool | None = None, **options: Any) -> Any:
        """Run `forward`, whose output is a tuple of its fields when `return_dict` is False.

        Raises: TypeError for a name that `forward` does not have.
        """
        for name in options:
            if name not in self._forward_names:
                raise TypeError(
                    f"{type(self).__name__} takes no argument {name!r}"
                    f"{did_you_mean(name, self._forward_names)}"
                )
        output = super().__call__(*args, **options)
        return output.to_tuple() if return_dict is False else output

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
        **options: Any,
    ) -> Self:
        """Load a model for inference from a directory, a hub id or a URL (see `resolve`).

        The weights may be those of the model with another head or with several: what this class has
        no place for is left out, and the log names it.
        config: used instead of the directory's, for instance with another `num_labels`.
        revision: a branch, tag or commit of a hub id.
        allow_new_head: draw what the weights lack outside the base model as `init_weights` does; a
            warning in the log names it. Without it only the pooler of a model without a head is
            drawn so, where `add_pooling_layer=False` does without.
        options: of the class itself, such as `add_pooling_layer`.
        Raises: ConfigError, CheckpointError when config or weights are missing or do not fit.
        """
        path = resolve(directory, revision=revision)
        # Nothing is drawn or copied before the real weights arrive.
<<<<<<< HEAD
        with meta_init():
            model = cls(config or cls.config_class.from_pretrained(path)).to(dtype)
=======
        with skeleton():
            model = cls(config or cls.config_class.from_pretrained(path), **options).to(dtype)
>>>>>>> ca94df7 (Read every tokenizer of a model directory; leave out heads a class lacks)
        load_into(
            model,
            read_state_dict(path),
            optional=cls._optional_weights,
            base=cls._base_name(),
            draw=model._drawn,
            allow_new_head=allow_new_head,
        )
        return model.to(device).eval()

    @classmethod
    def _base_name(cls) -> str:
        """Return the attribute that published classes keep the model without its head in."""
        return cls.config_class.model_type

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, readable by transformers as well."""
        dtype = str(self.dtype).removeprefix("torch.")
        self.config.save_pretrained(directory, architecture=type(self).__name__, dtype=dtype)
        write_state_dict(self, directory)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return how many numbers the weights hold; tied weights count once."""
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        return sum(
            p.numel()
            for p in self.parameters()
            if (p.requires_grad or not only_trainable)
            and not (exclude_embeddings and id(p) in embeddings)
        )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Keep only each layer's input in training and compute the rest again for the gradients.

        Raises: ConfigError when the reentrant form is asked for: it loses gradients of inputs that
            reach a layer other than by its first argument.
        """
        options = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        if options != {"use_reentrant": False}:
            raise ConfigError(
                f"gradient_checkpointing_kwargs are {gradient_checkpointing_kwargs}; only "
                "{'use_reentrant': False} is available"
            )
        self._set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all of a layer's results in training."""
        self._set_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Tell whether layers are computed again for the gradients."""
        return any(isinstance(m, LayerStack) and m.gradient_checkpointing for m in self.modules())

    def _set_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, LayerStack):
                module.gradient_checkpointing = value

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of token embeddings."""
        raise TypeError(f"{type(self).__name__} has no token embeddings")

    def tie_weights(self) -> None:
        """Let modules that share a weight by the config share it again."""

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Give the vocabulary another size, and all that depends on it; return the embeddings.

        Tokens that stay keep their weights; new ones draw theirs as at first, with zero biases.
        The config is replaced by a changed copy.
        Raises: ConfigError for a size below 1 and when a token id of the config would be cut off.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        old, config = self.config, dataclasses.replace(self.config, vocab_size=size)
        resized: dict[int, Tensor] = {}
        for name, tensor in self._vocabulary_weights():
            if id(tensor) not in resized:
                resized[id(tensor)] = _resized(tensor, size, config.initializer_range)
            owner, _, last = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, last, resized[id(tensor)])
            if isinstance(module, nn.Embedding):
                module.num_embeddings = size
            elif isinstance(module, nn.Linear):
                module.out_features = size
        for module in self.modules():
            if getattr(module, "config", None) is old:
                setattr(module, "config", config)  # noqa: B010 - a module's type does not know it
        return self.get_input_embeddings()

    def _vocabulary_weights(self) -> list[tuple[str, Tensor]]:
        named: Iterable[tuple[str, Tensor]] = [
            *self.named_parameters(remove_duplicate=False),
            *self.named_buffers(),
        ]
        return [(name, tensor) for name, tensor in named if name.endswith(_VOCABULARY_WEIGHTS)]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw weights as published: normal, with zero biases and zero padding rows.

        A model inside this one has drawn its own.
        """
        if self.device.type == "meta":
            return  # nothing to draw into; torch would take seconds over it
        inner = {
            id(m) for c in self.children() if isinstance(c, PretrainedModel) for m in c.modules()
        }
        own = [module for module in self.modules() if id(module) not in inner]
        for module in own:
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


def _resized(old: Tensor, size: int, std: float) -> Tensor:
    """Return a weight [V, d], a bias [V] or [1, V] with another V."""
    axis = 1 if old.dim() == 2 and len(old) == 1 else 0
    shape = list(old.shape)
    shape[axis] = size
    new = old.new_zeros(shape)
    if old.dim() == 2 and axis == 0:
        nn.init.normal_(new, std=std)
    kept = min(size, old.shape[axis])
    new.narrow(axis, 0, kept).copy_(old.narrow(axis, 0, kept))
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new
