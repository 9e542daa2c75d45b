"""The published `config.json` of Longformer and LED as checked dataclasses.

Windows are two-sided in published files (`attention_window`); everywhere else in this package one
side counts, and it is called `radius`. `PublishedConfig.radii` is the only place that converts.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from longformer_core.ai2 import published_config
from longformer_core.errors import ConfigError, did_you_mean

# Published files may carry these in config.json; they describe decoding, not the model, and are
# handed to the generation config. `use_cache` and the token ids are fields of the model config.
# fmt: off
_GENERATION_KEYS = frozenset({
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind",
    "assistant_temperature", "bad_words_ids", "begin_suppress_tokens", "cache_config",
    "cache_implementation", "constraints", "continuous_batching_config", "disable_compile",
    "diversity_penalty", "do_sample", "dola_layers", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id",
    "forced_eos_token_id", "guidance_scale", "is_assistant", "length_penalty", "low_memory",
    "max_length", "max_matching_ngram_size", "max_new_tokens", "max_time", "min_length",
    "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_logits", "output_scores", "penalty_alpha", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits", "repetition_penalty",
    "return_dict_in_generate", "sequence_bias", "stop_strings", "suppress_tokens",
    "target_lookbehind", "temperature", "token_healing", "top_h", "top_k", "top_p", "typical_p",
    "watermarking_config",
})
# fmt: on

# What a config.json that names no labels means.
_TWO_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}

PROBLEM_TYPES = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)


class PublishedConfig(ABC):
    """What both families share: unknown names, windows, token ids, labels, `config.json`.

    `num_labels` counts what a classification head tells apart; a config.json says it by the length
    of `id2label`, which is kept and written back.

    Keys of a published config.json that a class does not know are kept in `extra` and written
    back; keys that steer decoding are kept in `generation_defaults` and written back too. Unknown
    keyword arguments are errors.
    """

    __slots__ = ()

    model_type: ClassVar[str]
    # Other published names of the same fields.
    _aliases: ClassVar[Mapping[str, str]] = {}
    # Names of the fields that must be whole and at least 1, and of those between 0 and 1.
    _positive: ClassVar[tuple[str, ...]] = ()
    _probabilities: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:
        vocab_size: int
        eos_token_id: int | list[int] | None
        attention_window: int | list[int]
        num_labels: int
        problem_type: str | None
        extra: dict[str, Any]
        generation_defaults: dict[str, Any]

        def __init__(self, **options: Any) -> None: ...

    def __new__(cls, *_args: Any, **options: Any) -> Self:
        # The generated __init__ would answer an unknown name with a bare TypeError.
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in options:
            if name not in known:
                raise ConfigError(cls._unknown(name, known))
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self.check()

    @property
    def radii(self) -> tuple[int, ...]:
        """Return how many tokens each encoder layer sees on either side of a token."""
        return tuple(window // 2 for window in self._windows())

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return every id that ends a sequence; empty when there is none."""
        if self.eos_token_id is None:
            return ()
        if isinstance(self.eos_token_id, list):
            return tuple(self.eos_token_id)
        return (self.eos_token_id,)

    def check(self) -> None:
        """Raise ConfigError for the first field outside its range."""
        for name in self._positive:
            _check_integer(name, getattr(self, name), minimum=1)
        for name in self._probabilities:
            _check_number(name, getattr(self, name), "between 0 and 1", 0.0, 1.0)
        _check_integer("num_labels", self.num_labels, minimum=1)
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ConfigError(
                f"problem_type is {self.problem_type!r}; choose one of {list(PROBLEM_TYPES)}"
            )
        self._check_structure()
        self._check_token_ids()
        self._windows()

    @abstractmethod
    def _check_structure(self) -> None:
        """Raise ConfigError for fields that do not fit one another."""

    @property
    @abstractmethod
    def _num_window_layers(self) -> int:
        """Return how many layers have a window."""

    @abstractmethod
    def _token_ids(self) -> dict[str, Iterable[Any]]:
        """Return the token ids by field name, without those that are None."""

    def _check_token_ids(self) -> None:
        for name, values in self._token_ids().items():
            for value in values:
                _check_integer(name, value, minimum=0)
                if value >= self.vocab_size:
                    raise ConfigError(
                        f"{name} {value} is outside the vocabulary; "
                        f"it must be below vocab_size {self.vocab_size}"
                    )

    def _windows(self) -> tuple[int, ...]:
        layers = self._num_window_layers
        window = self.attention_window
        windows = tuple(window) if isinstance(window, list | tuple) else (window,) * layers
        if len(windows) != layers:
            raise ConfigError(
                f"attention_window lists {len(windows)} windows for {layers} encoder layers; give "
                "one per layer, or a single number"
            )
        for window in windows:
            _check_integer("attention_window", window, minimum=2)
            if window % 2:
                raise ConfigError(
                    f"attention_window {window} is odd; a window is two equal sides, so it is even"
                )
        return windows

    @classmethod
    def _own_names(cls) -> list[str]:
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        return [name for name in names if name not in ("extra", "generation_defaults")]

    @classmethod
    def _unknown(cls, name: str, known: list[str]) -> str:
        if name in cls._aliases:
            return f"{cls.__name__} calls {name!r} {cls._aliases[name]!r}; use that name"
        if name in _GENERATION_KEYS:
            return f"{name!r} steers decoding, not the model; set it on GenerationConfig"
        return f"{cls.__name__} has no option {name!r}{did_you_mean(name, known)}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the content of a config.json, of the published models or of the original release.

        Raises: ConfigError for another `model_type` and for values outside their range.
        """
        values = published_config(values, cls.model_type)
        model_type = values.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ConfigError(
                f"config.json describes a model of type {model_type!r}; this class reads "
                f"{cls.model_type!r} only; choose a directory that fits"
            )
        labels = values.get("id2label")
        if isinstance(labels, Mapping) and "num_labels" not in values:
            values = {**values, "num_labels": len(labels)}
        names = cls._own_names()
        known: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        generation: dict[str, Any] = {}
        for key, value in values.items():
            name = cls._aliases.get(key, key)
            if name in names:
                if known.get(name, value) != value:
                    raise ConfigError(
                        f"config.json gives {name} twice, as {known[name]!r} and as {value!r} "
                        f"({key} is another name for it); remove one"
                    )
                known[name] = value
            elif key in _GENERATION_KEYS:
                generation[key] = value
            elif key != "model_type":
                extra[key] = value
        return cls(**known, extra=extra, generation_defaults=generation)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read `config.json` of a local model directory.

        Raises: ConfigError when the file is missing, is not JSON, or describes another model.
        """
        return cls.from_dict(read_json(Path(directory) / "config.json"))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json: all fields, the labels, generation and extra keys."""
        self.check()
        own = {name: getattr(self, name) for name in self._own_names()}
        values = {**self.extra, **self.generation_defaults, **own, "model_type": self.model_type}
        count = values.pop("num_labels")
        if count != len(values.get("id2label", _TWO_LABELS)):
            values["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
            values["label2id"] = {f"LABEL_{i}": i for i in range(count)}
        if values["problem_type"] is None:
            del values["problem_type"]
        return dict(sorted(values.items()))

    def save_pretrained(
        self, directory: str | Path, *, architecture: str | None = None, dtype: str | None = None
    ) -> None:
        """Write `config.json`, naming the class and the dtype of the weights beside it when given.

        Readers of published directories load the weights in the dtype named here, so a model that
        was converted must not keep the old name.
        """
        values = self.to_dict()
        if architecture is not None:
            values["architectures"] = [architecture]
        if dtype is not None:
            values.pop("torch_dtype", None)
            values["dtype"] = dtype
        write_json(Path(directory) / "config.json", values)


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
        _check_number("init_std", self.init_std, "0 or greater", 0.0, float("inf"))
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
            "pad_token_id": _present(self.pad_token_id),
            "bos_token_id": _present(self.bos_token_id),
            "eos_token_id": self.eos_token_ids,
        }


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
        _check_number(
            "initializer_range", self.initializer_range, "0 or greater", 0.0, float("inf")
        )
        if not isinstance(self.hidden_act, str):
            raise ConfigError(f"hidden_act is {self.hidden_act!r}; give a name such as 'gelu'")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; each head takes an equal share of hidden_size"
            )
        _check_number("layer_norm_eps", self.layer_norm_eps, "above 0", 1e-30, 1.0)

    def _token_ids(self) -> dict[str, Iterable[Any]]:
        return {
            "pad_token_id": _present(self.pad_token_id),
            "bos_token_id": _present(self.bos_token_id),
            "eos_token_id": self.eos_token_ids,
            "sep_token_id": _present(self.sep_token_id),
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
            _check_integer("attention_dilation", dilation, minimum=1)
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


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object to a file of a model directory, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object from a file of a model directory.

    Raises: ConfigError when the file is missing or holds anything but a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist; a model directory holds {path.name} beside its weights"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; it must be one JSON object")
    return values


def _present(token_id: int | None) -> list[int]:
    return [] if token_id is None else [token_id]


def _check_integer(name: str, value: Any, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {minimum} or greater")


def _check_number(name: str, value: Any, limit: str, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a number {limit}")
