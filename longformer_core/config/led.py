"""The `config.json` of LED."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from longformer_core.config.base import PublishedConfig, check_number, present
from longformer_core.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class LEDConfig(PublishedConfig):
    """Describe one LED model: sizes, windows, dropout and token ids, under their published names.

    Units: `attention_window` is two-sided and counts tokens; `radii` is one-sided.
    Raises: ConfigError for unknown names and for values outside their range.
    Source: transformers 5.23 `LEDConfig` (names and defaults); Longformer, arXiv:2004.05150.
    """

    vocab_size: int = 50265
    max_encoder_position_embeddings: int = 16384
    max_decoder_position_embeddings: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    use_cache: bool = True
    is_encoder_decoder: bool = True
    activation_function: str = "gelu"
    d_model: int = 1024
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    decoder_start_token_id: int = 2
    classifier_dropout: float = 0.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    attention_window: int | list[int] = 512
    tie_word_embeddings: bool = True
    num_labels: int = 2
    problem_type: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    generation_defaults: dict[str, Any] = field(default_factory=dict)

    model_type: ClassVar[str] = "led"

    _positive: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "max_encoder_position_embeddings",
        "max_decoder_position_embeddings",
        "encoder_layers",
        "encoder_ffn_dim",
        "encoder_attention_heads",
        "decoder_layers",
        "decoder_ffn_dim",
        "decoder_attention_heads",
        "d_model",
    )
    _probabilities: ClassVar[tuple[str, ...]] = (
        "encoder_layerdrop",
        "decoder_layerdrop",
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "classifier_dropout",
    )
    _aliases: ClassVar[Mapping[str, str]] = {
        "num_attention_heads": "encoder_attention_heads",
        "hidden_size": "d_model",
        "attention_probs_dropout_prob": "attention_dropout",
        "initializer_range": "init_std",
        "num_hidden_layers": "encoder_layers",
    }

    # The names under which shared code of the published library reads the same fields.
    @property
    def hidden_size(self) -> int:
        """Return `d_model`."""
        return self.d_model

    @property
    def num_attention_heads(self) -> int:
        """Return `encoder_attention_heads`."""
        return self.encoder_attention_heads

    @property
    def num_hidden_layers(self) -> int:
        """Return `encoder_layers`."""
        return self.encoder_layers

    @property
    def intermediate_size(self) -> int:
        """Return `encoder_ffn_dim`."""
        return self.encoder_ffn_dim

    @property
    def attention_probs_dropout_prob(self) -> float:
        """Return `attention_dropout`."""
        return self.attention_dropout

    @property
    def initializer_range(self) -> float:
        """Return `init_std`."""
        return self.init_std

    @property
    def max_position_embeddings(self) -> int:
        """Return the longest document that the encoder takes, in tokens."""
        return self.max_encoder_position_embeddings

    @property
    def _num_window_layers(self) -> int:
        return self.encoder_layers

    def _check_structure(self) -> None:
        check_number("init_std", self.init_std, "0 or greater", 0.0, float("inf"))
        if not isinstance(self.activation_function, str):
            raise ConfigError(
                f"activation_function is {self.activation_function!r}; give a name such as 'gelu'"
            )
        if self.is_encoder_decoder is not True:
            raise ConfigError("is_encoder_decoder must be true: LED has an encoder and a decoder")
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_attention_heads")
            if self.d_model % heads:
                raise ConfigError(
                    f"d_model {self.d_model} is not divisible by {side}_attention_heads {heads}; "
                    "each head takes an equal share of d_model"
                )

    def _token_ids(self) -> dict[str, Iterable[Any]]:
        return {
            "decoder_start_token_id": [self.decoder_start_token_id],
            "pad_token_id": present(self.pad_token_id),
            "bos_token_id": present(self.bos_token_id),
            "eos_token_id": self.eos_token_ids,
        }
