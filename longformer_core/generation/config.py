"""How to decode: beams, lengths, penalties and sampling, under their published names."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from longformer_core.config import LEDConfig
from longformer_core.config.base import read_json, write_json
from longformer_core.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

# Published options that we do not have, each with the values at which it changes no output.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "constraints": (),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "force_words_ids": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "top_h": (),
    "watermarking_config": (),
}
_OPTIONAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_POSITIVE = ("repetition_penalty", "encoder_repetition_penalty", "temperature", "typical_p")
_SHARES = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_SWITCHES = ("do_sample", "renormalize_logits", "output_scores")
# What belongs to a call and not to a file.
_CALLABLES = ("prefix_allowed_tokens_fn", "text_of")
_NOT_IN_FILES = ("output_scores", *_CALLABLES)
_DEFAULT_NEW_TOKENS = 20

GENERATION_FILE = "generation_config.json"

EarlyStopping = bool | Literal["never"]
TokenIds = tuple[int, ...]
_Options = TypeVar("_Options", bound="GenerationConfig")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """Say how documents are decoded. Names, defaults and meanings are the published library's.

    Lists become tuples, so that equal options are equal and can be grouped.
    Units: `max_length` and `min_length` count the decoder's start token; `max_new_tokens` and
    `min_new_tokens` do not, and win over the other two. With no limit at all, 20 new tokens.
    Numerics: a beam's score is its summed log-probability / generated tokens ** length_penalty.

    sequence_bias: what to add to the score of a sequence's last token; {ids: bias} or pairs.
    exponential_decay_length_penalty: from how many new tokens on, and by what factor per token,
    the end becomes more likely.
    prefix_allowed_tokens_fn: called with 0, because documents are decoded independently, and with
    the int64 tensor of what one row has written, start token included; returns the ids that may
    come next.
    stop_strings: a sequence ends with the token in which one of them ends. They need `text_of`,
    which decodes ids, special tokens included.
    Callables are compared by identity, and written to no file.
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
    sequence_bias: tuple[tuple[TokenIds, float], ...] = ()
    suppress_tokens: TokenIds = ()
    begin_suppress_tokens: TokenIds = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | TokenIds | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    prefix_allowed_tokens_fn: Callable[[int, Any], Sequence[int]] | None = None
    stop_strings: tuple[str, ...] = ()
    text_of: Callable[[Sequence[int]], str] | None = None
    renormalize_logits: bool = False
    output_scores: bool = False
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
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
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
            put(name, _tuples(getattr(self, name) or ()))
        for name in ("forced_eos_token_id", "eos_token_id", "exponential_decay_length_penalty"):
            put(name, _tuples(getattr(self, name)))
        put("sequence_bias", _biases(self.sequence_bias))
        stops = self.stop_strings or ()
        put("stop_strings", (stops,) if isinstance(stops, str) else _tuples(stops))
        self._check_counts()
        self._check_numbers()
        self._check_choices()
        self._check_words()
        # The published library takes a whole number for a mistake in most of these.
        for name in (*_POSITIVE, "length_penalty"):
            put(name, float(getattr(self, name)))

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
            "prompt_lookup_num_tokens": 1,
            "max_matching_ngram_size": 1,
        }
        optional = ("max_length", "max_new_tokens", "min_new_tokens", "prompt_lookup_num_tokens")
        for name, low in minimum.items():
            value = getattr(self, name)
            if not (name in optional and value is None):
                _check_count(name, value, minimum=low)

    def _check_numbers(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not _is_number(value) or not value > 0:
                raise ConfigError(f"{name} is {value!r}; it must be a number greater than 0")
        if not _is_number(self.length_penalty):
            raise ConfigError(f"length_penalty is {self.length_penalty!r}; it must be a number")
        for name in _SHARES:
            value = getattr(self, name)
            if name == "min_p" and value is None:
                continue
            if not _is_number(value) or not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value!r}; it must be a number between 0 and 1")
        decay: Any = self.exponential_decay_length_penalty
        if decay is not None:
            if not isinstance(decay, tuple) or len(decay) != 2 or not _is_number(decay[1]):
                raise ConfigError(
                    f"exponential_decay_length_penalty is {decay!r}; it must be a pair: a number "
                    "of tokens, and a factor"
                )
            _check_count("the start of exponential_decay_length_penalty", decay[0], minimum=0)

    def _check_choices(self) -> None:
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}; it must be true or false")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ConfigError(
                f"early_stopping is {self.early_stopping!r}; it must be true, false or 'never'"
            )
        for name in _CALLABLES:
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigError(f"{name} is {value!r}; it must be callable")

    def _check_words(self) -> None:
        for name, ids in self._token_ids():
            for value in ids:
                _check_count(name, value, minimum=0)
        if () in self.bad_words_ids:
            raise ConfigError("bad_words_ids holds an empty word; each word is one or more ids")
        if () in dict(self.sequence_bias):
            raise ConfigError("sequence_bias holds an empty sequence; each is one or more ids")
        stops: Any = self.stop_strings
        is_texts = isinstance(stops, tuple) and all(isinstance(stop, str) for stop in stops)
        if not is_texts or "" in stops:
            raise ConfigError(f"stop_strings is {stops!r}; it must be texts, none of them empty")

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
            ("sequence_bias", [token for ids, _ in self.sequence_bias for token in ids]),
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
    def without_lengths(self) -> Self:
        """Return the same options without the four lengths, for a search that has those by itself.

        Documents of which these are equal are searched together.
        """
        found: Self = _without_lengths(self)
        return found

    @property
    def rows_per_document(self) -> int:
        """Return how many rows of one document are decoded side by side.

        Its sequences, or with `prompt_lookup_num_tokens` a token and those guessed after it.
        """
        if self.prompt_lookup_num_tokens is not None:
            return 1 + self.prompt_lookup_num_tokens
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
        path = Path(directory) / GENERATION_FILE
        return cls.from_model_config(config, read_json(path) if path.exists() else None)

    @classmethod
    def from_model_config(cls, config: LEDConfig, given: Mapping[str, Any] | None = None) -> Self:
        """Complete the content of a generation_config.json by a model's own special tokens.

        Without a file's content, take the options that a published config.json may hold.
        Raises: as `from_dict`.
        """
        values: dict[str, Any] = {
            name: getattr(config, name) for name in ("decoder_start_token_id", *_OPTIONAL_IDS)
        }
        if given is None:
            given = dict(config.generation_defaults)
            if config.extra.get("force_bos_token_to_be_generated"):
                given["forced_bos_token_id"] = config.bos_token_id
        values.update({key: value for key, value in given.items() if value is not None})
        for name in _NOT_IN_FILES:
            values.pop(name, None)
        return cls.from_dict(values)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write generation_config.json: the token ids, and the options that differ from defaults.

        What belongs to a call is left out: callables, and output_scores.
        """
        values = self.to_dict()
        default = type(self)().to_dict()
        ids = ("decoder_start_token_id", *_OPTIONAL_IDS)
        written = {
            name: value
            for name, value in values.items()
            if name not in _NOT_IN_FILES and (name in ids or value != default[name])
        }
        write_json(Path(directory) / GENERATION_FILE, written)

    def replace(self, **options: Any) -> Self:
        """Return a copy with some options changed.

        Raises: ConfigError for an unknown name or a value outside its range.
        """
        return dataclasses.replace(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON values, callables left out."""
        names = [f.name for f in fields(self) if f.name not in _CALLABLES]
        return {name: _lists(getattr(self, name)) for name in names}

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
        samples_rows = self.do_sample and self.num_beams == 1
        if not samples_rows and self.num_return_sequences > self.num_beams:
            raise ConfigError(
                f"num_return_sequences {self.num_return_sequences} exceeds num_beams "
                f"{self.num_beams}; raise num_beams, or sample without beams"
            )
        if self.prompt_lookup_num_tokens is not None and (
            self.do_sample or self.num_beams > 1 or self.num_return_sequences > 1
        ):
            raise ConfigError(
                "prompt_lookup_num_tokens works for greedy decoding of one sequence; remove it, or "
                "do_sample, num_beams and num_return_sequences"
            )
        if self.stop_strings and self.text_of is None:
            raise ConfigError(
                "stop_strings need text_of, which decodes token ids; set it to the tokenizer's "
                "decode, or remove stop_strings"
            )
        if self.shortest_length > self.total_length:
            logger.warning(
                "the shortest output (%d tokens) is longer than the longest (%d), start token "
                "included; sequences end at the longest",
                self.shortest_length,
                self.total_length,
            )


@functools.lru_cache(maxsize=256)
def _without_lengths(options: _Options) -> _Options:
    return options.replace(max_length=None, max_new_tokens=None, min_length=0, min_new_tokens=None)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _biases(value: Any) -> tuple[tuple[TokenIds, float], ...]:
    """Return {ids: bias}, or pairs of both, as pairs; the last bias of the same ids counts."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value or ()
    if not isinstance(pairs, list | tuple):
        raise ConfigError(f"sequence_bias is {value!r}; it must be pairs of ids and a number")
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not _is_bias(pair[1]):
            raise ConfigError(f"sequence_bias holds {pair!r}; each item must be ids and a number")
        if not isinstance(pair[0], list | tuple):
            raise ConfigError(f"sequence_bias holds {pair[0]!r}; it must be a list of ids")
    return tuple({_tuples(ids): float(bias) for ids, bias in pairs}.items())


def _is_bias(value: Any) -> bool:
    return _is_number(value) or value == -float("inf")


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
