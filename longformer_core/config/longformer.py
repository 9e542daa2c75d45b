"""The `config.json` of Longformer, published and causal."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from longformer_core.config.base import PublishedConfig, check_integer, check_number, present
from longformer_core.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class LongformerConfig(PublishedConfig):
    """Describe one Longformer model under the published names.

    Units: `attention_window` is two-sided and counts tokens; `radii` is one-sided.
        `max_position_embeddings` counts two rows more than the longest document has tokens.
    Raises: ConfigError for unknown names and for values outside their range.
    Source: transformers 5.23 `LongformerConfig` (names and defaults); arXiv:2004.05150.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    attention_window: int | list[int] = 512
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    sep_token_id: int | None = 2
    tie_word_embeddings: bool = True
    num_labels: int = 2
    problem_type: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    generation_defaults: dict[str, Any] = field(default_factory=dict)

    model_type: ClassVar[str] = "longformer"
    _positive: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
    )
    _probabilities: ClassVar[tuple[str, ...]] = (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    )

    @property
    def max_length(self) -> int:
        """Return the most tokens of a document: positions are counted from `pad_token_id` + 1."""
        return self.max_position_embeddings - (self.pad_token_id or 0) - 1

    @property
    def _num_window_layers(self) -> int:
        return self.num_hidden_layers

    def _check_structure(self) -> None:
        check_number("initializer_range", self.initializer_range, "0 or greater", 0.0, float("inf"))
        if not isinstance(self.hidden_act, str):
            raise ConfigError(f"hidden_act is {self.hidden_act!r}; give a name such as 'gelu'")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; each head takes an equal share of hidden_size"
            )
        check_number("layer_norm_eps", self.layer_norm_eps, "above 0", 1e-30, 1.0)

    def _token_ids(self) -> dict[str, Iterable[Any]]:
        return {
            "pad_token_id": present(self.pad_token_id),
            "bos_token_id": present(self.bos_token_id),
            "eos_token_id": self.eos_token_ids,
            "sep_token_id": present(self.sep_token_id),
        }


@dataclass(kw_only=True, slots=True)
class LongformerCausalConfig(LongformerConfig):
    """Describe a language model on causal windows, `LongformerForCausalLM`.

    Positions are rotations of queries and keys, so that `max_position_embeddings` and
    `type_vocab_size` have no effect.
    attention_dilation: how far apart the keys of a window lie; one number, one for each layer, or
        for each layer one for each head.
    Units: `attention_window` is two-sided as everywhere, and a token sees the half before it:
        `radii` keys to the left, `attention_dilation` tokens apart.
    Source: Longformer, arXiv:2004.05150, section 4.
    """

    attention_dilation: int | list[int] | list[list[int]] = 1

    model_type: ClassVar[str] = "longformer_causal"

    @classmethod
    def with_schedule(
        cls,
        *,
        smallest_window: int = 32,
        largest_window: int = 512,
        is_dilated: bool = True,
        **options: Any,
    ) -> Self:
        """Return a config with windows and dilations that grow with depth, as in the paper.

        Windows double from the smallest on up to the largest. The lower half of the layers is not
        dilated, so that they learn from what is near; in the upper half two heads see keys 2, 3
        and at last 4 tokens apart.
        """
        config = cls(**options)
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        config.attention_window = [
            min(smallest_window * 2**layer, largest_window) for layer in range(layers)
        ]
        if is_dilated:
            lower = layers - layers // 2
            reach = [1] * lower + [
                2 + upper * 3 // (layers - lower) for upper in range(layers - lower)
            ]
            config.attention_dilation = [
                [1] * max(heads - 2, 0) + [each] * min(heads, 2) for each in reach
            ]
        config.check()
        return config

    @property
    def dilations(self) -> tuple[tuple[int, ...], ...]:
        """Return the dilation of every head, layer by layer.

        Raises: ConfigError when there are not as many as layers and heads.
        """
        given, heads = self.attention_dilation, self.num_attention_heads
        layers = given if isinstance(given, list) else [given] * self.num_hidden_layers
        every = tuple(
            tuple(layer) if isinstance(layer, list) else (layer,) * heads for layer in layers
        )
        for dilation in (each for layer in every for each in layer):
            check_integer("attention_dilation", dilation, minimum=1)
        if len(every) != self.num_hidden_layers or any(len(layer) != heads for layer in every):
            raise ConfigError(
                f"attention_dilation is {given} for {self.num_hidden_layers} layers of {heads} "
                "heads; give one number, one for each layer, or for each layer one for each head"
            )
        return every

    def _check_structure(self) -> None:
        LongformerConfig._check_structure(self)
        if self.hidden_size // self.num_attention_heads % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} gives {self.num_attention_heads} heads an odd "
                "share; positions rotate pairs of numbers, so it must be even"
            )
        _ = self.dilations
