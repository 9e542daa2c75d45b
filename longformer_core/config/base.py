"""The published `config.json` of Longformer and LED as checked dataclasses.

Windows are two-sided in published files (`attention_window`); everywhere else in this package one
side counts, and it is called `radius`. `PublishedConfig.radii` is the only place that converts.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from longformer_core.config.ai2 import published_config
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
    """What both models share: unknown names, windows, token ids, labels, `config.json`.

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
            check_integer(name, getattr(self, name), minimum=1)
        for name in self._probabilities:
            check_number(name, getattr(self, name), "between 0 and 1", 0.0, 1.0)
        check_integer("num_labels", self.num_labels, minimum=1)
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
                check_integer(name, value, minimum=0)
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
            check_integer("attention_window", window, minimum=2)
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


def present(token_id: int | None) -> list[int]:
    return [] if token_id is None else [token_id]


def check_integer(name: str, value: Any, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {minimum} or greater")


def check_number(name: str, value: Any, limit: str, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a number {limit}")
