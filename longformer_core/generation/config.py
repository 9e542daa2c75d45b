"""How to decode: beams, lengths, penalties and sampling, under their published names."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from longformer_core.config import LEDConfig, read_json
from longformer_core.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

# Published options that we do not have, each with the values at which it changes no output.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "constraints": (),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "min_p": (0.0,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "sequence_bias": (),
    "stop_strings": (),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1.0,),
    "watermarking_config": (),
}
_OPTIONAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DEFAULT_NEW_TOKENS = 20

EarlyStopping = bool | Literal["never"]
TokenIds = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """Say how documents are decoded. Names, defaults and meanings are the published library's.

    Lists become tuples, so that equal options are equal and can be grouped.
    Units: `max_length` and `min_length` count the decoder's start token; `max_new_tokens` and
    `min_new_tokens` do not, and win over the other two. With no limit at all, 20 new tokens.
    Numerics: a beam's score is its summed log-probability / generated tokens ** length_penalty.
    Raises: ConfigError for a value outside its range; `check` compares the options with a model.
    Source: transformers 5.23 `GenerationConfig`.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    bad_words_ids: tuple[TokenIds, ...] = ()
    suppress_tokens: TokenIds = ()
    begin_suppress_tokens: TokenIds = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | TokenIds | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    decoder_start_token_id: int = 2
    bos_token_id: int | None = 0
    eos_token_id: int | TokenIds | None = 2
    pad_token_id: int | None = 1

    def __new__(cls, *_args: Any, **options: Any) -> Self:
        # The generated __init__ would answer an unknown name with a bare TypeError.
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"GenerationConfig has no option {name!r}{did_you_mean(name, known)}"
                )
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for name in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
            object.__setattr__(self, name, _tuples(getattr(self, name) or ()))
        for name in ("forced_eos_token_id", "eos_token_id"):
            object.__setattr__(self, name, _tuples(getattr(self, name)))
        self._check_counts()
        self._check_numbers()
        for name, ids in self._token_ids():
            for value in ids:
                _check_count(name, value, minimum=0)
        if () in self.bad_words_ids:
            raise ConfigError("bad_words_ids holds an empty word; each word is one or more ids")

    def _check_counts(self) -> None:
        minimum = {
            "max_length": 2,
            "max_new_tokens": 1,
            "min_length": 0,
            "min_new_tokens": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "no_repeat_ngram_size": 0,
            "encoder_no_repeat_ngram_size": 0,
            "top_k": 0,
        }
        optional = ("max_length", "max_new_tokens", "min_new_tokens")
        for name, low in minimum.items():
            value = getattr(self, name)
            if not (name in optional and value is None):
                _check_count(name, value, minimum=low)

    def _check_numbers(self) -> None:
        for name in ("repetition_penalty", "encoder_repetition_penalty", "temperature"):
            value = getattr(self, name)
            if not _is_number(value) or not value > 0:
                raise ConfigError(f"{name} is {value!r}; it must be a number greater than 0")
        if not _is_number(self.length_penalty):
            raise ConfigError(f"length_penalty is {self.length_penalty!r}; it must be a number")
        if not _is_number(self.top_p) or not 0 <= self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p!r}; it must be a number between 0 and 1")
        if not isinstance(self.do_sample, bool):
            raise ConfigError(f"do_sample is {self.do_sample!r}; it must be true or false")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ConfigError(
                f"early_stopping is {self.early_stopping!r}; it must be true, false or 'never'"
            )

    def _token_ids(self) -> list[tuple[str, Iterable[Any]]]:
        return [
            ("decoder_start_token_id", (self.decoder_start_token_id,)),
            ("bos_token_id", _as_ids(self.bos_token_id)),
            ("eos_token_id", self.eos_token_ids),
            ("pad_token_id", _as_ids(self.pad_token_id)),
            ("forced_bos_token_id", _as_ids(self.forced_bos_token_id)),
            ("forced_eos_token_id", self.forced_eos_token_ids),
            ("suppress_tokens", self.suppress_tokens),
            ("begin_suppress_tokens", self.begin_suppress_tokens),
            ("bad_words_ids", [token for word in self.bad_words_ids for token in word]),
        ]

    @property
    def eos_token_ids(self) -> TokenIds:
        """Return every id that ends a sequence."""
        return _as_ids(self.eos_token_id)

    @property
    def forced_eos_token_ids(self) -> TokenIds:
        """Return the ids allowed at the last position, or nothing when all are."""
        return _as_ids(self.forced_eos_token_id)

    @property
    def total_length(self) -> int:
        """Return the longest sequence in tokens, the decoder's start token included."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens + 1
        return _DEFAULT_NEW_TOKENS + 1 if self.max_length is None else self.max_length

    @property
    def shortest_length(self) -> int:
        """Return the length, start token included, before which no sequence may end."""
        return self.min_length if self.min_new_tokens is None else self.min_new_tokens + 1

    @property
    def rows_per_document(self) -> int:
        """Return how many sequences of one document are decoded side by side."""
        return max(self.num_beams, self.num_return_sequences)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the content of a published generation_config.json; null means unset, or no such id.

        Raises: ConfigError when the file uses a published option that would change the output and
        is not supported here. Keys that only steer how the published library computes are ignored.
        """
        values = {
            key: value for key, value in values.items() if value is not None or key in _OPTIONAL_IDS
        }
        for name, neutral in _ABSENT.items():
            if name in values and values[name] not in neutral:
                raise ConfigError(
                    f"the generation options set {name} to {values[name]!r}, which is not "
                    "supported here; remove it, or decode with another program"
                )
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read a local model directory: generation_config.json, else the keys in config.json.

        Special token ids that the generation options leave out are those of the model.
        Raises: ConfigError when a file cannot be read or holds an option out of range.
        """
        config = LEDConfig.from_pretrained(directory)
        values: dict[str, Any] = {
            name: getattr(config, name) for name in ("decoder_start_token_id", *_OPTIONAL_IDS)
        }
        path = Path(directory) / "generation_config.json"
        if path.exists():
            given = read_json(path)
        else:
            given = dict(config.generation_defaults)
            if config.extra.get("force_bos_token_to_be_generated"):
                given["forced_bos_token_id"] = config.bos_token_id
        values.update({key: value for key, value in given.items() if value is not None})
        return cls.from_dict(values)

    def replace(self, **options: Any) -> Self:
        """Return a copy with some options changed.

        Raises: ConfigError for an unknown name or a value outside its range.
        """
        return dataclasses.replace(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        return {f.name: _lists(getattr(self, f.name)) for f in fields(self)}

    def check(self, config: LEDConfig) -> None:
        """Make sure that a model can decode with these options.

        Raises: ConfigError when the output exceeds the decoder's positions, when no id ends a
        sequence, when an id is outside the vocabulary, or when two options exclude each other.
        """
        limit = config.max_decoder_position_embeddings
        if self.total_length - 1 > limit:
            raise ConfigError(
                f"the options ask for {self.total_length - 1} new tokens, but the decoder has "
                f"{limit} positions; set max_new_tokens to {limit} or less"
            )
        if not self.eos_token_ids:
            raise ConfigError("eos_token_id is not set, so no sequence could end; set it")
        for name, ids in self._token_ids():
            for value in ids:
                if value >= config.vocab_size:
                    raise ConfigError(
                        f"{name} holds {value}, which is outside the vocabulary; it must be below "
                        f"vocab_size {config.vocab_size}"
                    )
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.do_sample and self.num_beams > 1:
            raise ConfigError(
                f"do_sample with num_beams {self.num_beams} is not supported; set num_beams to 1 "
                "to sample, or do_sample to false for beam search"
            )
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise ConfigError(
                f"num_return_sequences {self.num_return_sequences} exceeds num_beams "
                f"{self.num_beams}; raise num_beams, or sample"
            )
        if self.shortest_length > self.total_length:
            logger.warning(
                "the shortest output (%d tokens) is longer than the longest (%d), start token "
                "included; sequences end at the longest",
                self.shortest_length,
                self.total_length,
            )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _as_ids(value: int | TokenIds | None) -> TokenIds:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < float("inf")


def _check_count(name: str, value: Any, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {minimum} or greater")
