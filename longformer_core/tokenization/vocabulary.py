"""The tokens of a vocabulary and their ids: special and added tokens, read and saved.

To the bare vocabularies of older releases (see `files`) the special tokens and rules of their
algorithm are added here.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, Tokenizer

from longformer_core.errors import TokenizerError, did_you_mean
from longformer_core.hub import resolve
from longformer_core.tokenization.algorithms import (
    Algorithm,
    ByteLevelBPE,
    WordPiece,
    algorithm_of,
)
from longformer_core.tokenization.files import (
    read_backend,
    read_parts,
    read_settings,
    read_whole,
)

# What stands for "no limit" in published files; nobody has such a text.
NO_LIMIT = int(1e30)
_ROLES = tuple(Algorithm.roles)
# The newer releases of transformers write the second name.
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_SETTINGS = (
    *_ROLES,
    *_EXTRA,
    *ByteLevelBPE.rules,
    *WordPiece.rules,
    "model_max_length",
    "padding_side",
    "truncation_side",
    "split_special_tokens",
)
_FIELDS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")


class _Role:
    """The token of one role; it may be set to any token of the vocabulary."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, vocabulary: "Vocabulary", owner: type) -> str:
        return vocabulary._roles[self.name]

    def __set__(self, vocabulary: "Vocabulary", token: "str | AddedToken") -> None:
        vocabulary._give_roles({self.name: _content(token)})


class _RoleId:
    """The id of the token of one role."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.role = name.removesuffix("_id")

    def __get__(self, vocabulary: "Vocabulary", owner: type) -> int:
        return vocabulary._id(self.role)

    def __set__(self, vocabulary: "Vocabulary", number: int) -> None:
        raise AttributeError(f"set {self.role}, the token; its id follows")


class Vocabulary:
    """Tokens and ids, read from and written to a model directory.

    Settings: the special tokens by role (`bos_token` ...), `additional_special_tokens`,
    `model_max_length` in tokens, `padding_side` and `truncation_side` ("right" or "left"),
    `split_special_tokens` (a special token written out in a text is text). Of byte-level BPE:
    `add_prefix_space` (the first word is tokenized as if a space came before it), `trim_offsets`
    (offsets leave out spaces; default True). Of WordPiece: `do_lower_case`, `strip_accents` (None:
    when lower case is asked for), `tokenize_chinese_chars` (each is a word).
    Raises: TokenizerError for files that are missing or damaged, for a vocabulary that lacks a
    special token, and for a setting that is unknown or of another algorithm.
    """

    bos_token, eos_token, unk_token, sep_token = _Role(), _Role(), _Role(), _Role()
    pad_token, cls_token, mask_token = _Role(), _Role(), _Role()
    bos_token_id, eos_token_id, unk_token_id = _RoleId(), _RoleId(), _RoleId()
    sep_token_id, pad_token_id = _RoleId(), _RoleId()
    cls_token_id, mask_token_id = _RoleId(), _RoleId()
    pad_token_type_id = 0
    is_fast = True
    # The name under which transformers knows a class like this one with the model's own tokenizer.
    _published_name = "LongformerTokenizer"

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        merges_file: str | Path | None = None,
        tokenizer_file: str | Path | None = None,
        **settings: Any,
    ) -> None:
        _check_settings(settings)
        if tokenizer_file is not None:
            backend = read_whole(Path(tokenizer_file))
        elif vocab_file is not None and merges_file is not None:
            backend = read_parts(Path(vocab_file), Path(merges_file))
        else:
            raise TokenizerError("give tokenizer_file, or vocab_file and merges_file")
        _check_rules(algorithm_of(backend), settings)
        self._adopt(backend, settings)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **settings: Any) -> Self:
        """Read a directory, hub id or URL (see `resolve`); `settings` replace stored ones.

        Raises: TokenizerError as above; CheckpointError when there is no such directory.
        """
        _check_settings(settings)
        path = resolve(directory)
        backend = read_backend(path)
        _check_rules(algorithm_of(backend), settings)
        self = cls.__new__(cls)
        self._adopt(backend, {**read_settings(path), **settings})
        return self

    def _adopt(self, backend: Tokenizer, settings: dict[str, Any]) -> None:
        # A stored tokenizer may carry the limits of the run that saved it.
        backend.no_truncation()
        backend.no_padding()
        algorithm = algorithm_of(backend)
        self._backend, self._settings, self._algorithm = backend, settings, algorithm
        self.model_max_length = int(settings.get("model_max_length") or NO_LIMIT)
        self.padding_side = str(settings.get("padding_side", "right"))
        self.truncation_side = str(settings.get("truncation_side", "right"))
        self.split_special_tokens = bool(settings.get("split_special_tokens", False))
        self.model_input_names = tuple(
            settings.get("model_input_names") or algorithm.model_input_names
        )
        self._roles: dict[str, str] = {}
        self._set_roles(_role_tokens(algorithm, settings))
        is_bare = algorithm.comes_bare and backend.pre_tokenizer is None
        if is_bare or settings.keys() & set(algorithm.rules):
            algorithm.lay_out(backend, {**settings, **self._roles})
        if is_bare:
            # RoBERTa's <mask> takes the space before it.
            lstrip = "mask_token" if isinstance(algorithm, ByteLevelBPE) else None
            backend.add_special_tokens(
                [_special(token, lstrip=role == lstrip) for role, token in self._roles.items()]
            )
        if is_bare or isinstance(backend.post_processor, algorithm.framed_by):
            self._frame(backend)
        _add_stored(backend, settings, is_bare=is_bare)

    def _frame(self, backend: Tokenizer) -> None:
        """Let a backend put the tokens of the roles around texts and pairs."""
        cls, sep = (self.cls_token, self.cls_token_id), (self.sep_token, self.sep_token_id)
        self._algorithm.frame(backend, self._settings, cls, sep)

    def _set_roles(self, tokens: Mapping[str, str]) -> None:
        for role, token in tokens.items():
            if self._backend.token_to_id(token) is None:
                raise TokenizerError(
                    f"the vocabulary has no {role} {token!r}; add it to the vocabulary, or name "
                    f"the right one as {role} in tokenizer_config.json"
                )
        self._roles.update(tokens)

    def _give_roles(self, tokens: Mapping[str, str]) -> None:
        self._set_roles(tokens)
        if {"sep_token", "cls_token"} & tokens.keys():
            self._frame(self._backend)

    def _id(self, role: str) -> int:
        return _known_id(self._backend, self._roles[role])

    @property
    def add_prefix_space(self) -> bool:
        """Whether the first word of a text is tokenized as if a space came before it."""
        return bool(getattr(self._backend.pre_tokenizer, "add_prefix_space", False))

    @property
    def _has_prefix_space(self) -> bool:
        return "add_prefix_space" in self._algorithm.rules

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The object of the `tokenizers` library."""
        return self._backend

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens without those that were added; see `len` for all."""
        return int(self._backend.get_vocab_size(with_added_tokens=False))

    def __len__(self) -> int:
        """Return the number of ids, added tokens included; every id is below it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token, added ones included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def get_added_vocab(self) -> dict[str, int]:
        """Return the id of every special or added token, by rising id."""
        return {token.content: number for number, token in self._added()}

    def _added(self) -> list[tuple[int, AddedToken]]:
        return sorted(self._backend.get_added_tokens_decoder().items())

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Return the token of each role."""
        return dict(self._roles)

    @property
    def additional_special_tokens(self) -> list[str]:
        """Return the special tokens that have no role, by rising id."""
        named = set(self._roles.values())
        return [t.content for _, t in self._added() if t.special and t.content not in named]

    @property
    def all_special_tokens(self) -> list[str]:
        """Return the tokens of the roles, then the additional ones, each once."""
        return list(dict.fromkeys([*self._roles.values(), *self.additional_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        """Return the ids of `all_special_tokens`."""
        return [_known_id(self._backend, token) for token in self.all_special_tokens]

    def add_tokens(
        self,
        new_tokens: "str | AddedToken | Sequence[str | AddedToken]",
        special_tokens: bool = False,
    ) -> int:
        """Add tokens after the highest id, and return how many were new.

        `special_tokens`: decoding leaves them out on request.
        The model must grow as well: its embedding has one row per id.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens)
        add = self._backend.add_special_tokens if special_tokens else self._backend.add_tokens
        before = len(self)
        add(tokens)
        return len(self) - before

    def add_special_tokens(self, tokens: Mapping[str, Any]) -> int:
        """Give roles new tokens, or add `additional_special_tokens`; return how many were new.

        Raises: TokenizerError for a name that is no role.
        """
        known = (*_ROLES, *_EXTRA)
        for name in tokens.keys() - set(known):
            raise TokenizerError(f"there is no special token {name!r}{did_you_mean(name, known)}")
        before = len(self)
        for name, value in tokens.items():
            values = list(value) if name in _EXTRA else [value]
            self._backend.add_special_tokens(
                [v if isinstance(v, AddedToken) else _special(v) for v in values]
            )
            if name in _ROLES:
                self._give_roles({name: _content(value)})
        return len(self) - before

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a token, or the ids of several; an unknown token has `unk_token_id`."""
        if isinstance(tokens, str):
            number = self._backend.token_to_id(tokens)
            return self.unk_token_id if number is None else int(number)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> Any:
        """Return the token of an id, or the tokens of several; None for an id that has none."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        left_out = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._backend.id_to_token(int(i)) for i in ids if int(i) not in left_out]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Return the text that tokens spell."""
        return str(self._backend.decoder.decode(list(tokens)))

    def save_vocabulary(
        self, directory: str | Path, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the vocabulary alone, without added tokens; return the paths.

        That is vocab.json and merges.txt, or vocab.txt, or nothing for tokenizers that only
        tokenizer.json can hold.
        """
        Path(directory).mkdir(parents=True, exist_ok=True)
        if not self._algorithm.comes_bare:
            return ()
        return tuple(self._backend.model.save(str(directory), filename_prefix))

    def save_pretrained(self, directory: str | Path) -> tuple[str, ...]:
        """Write the files that this class, and transformers' AutoTokenizer, read to equal ids."""
        path = Path(directory)
        parts = self.save_vocabulary(path)
        whole, settings_file = path / "tokenizer.json", path / "tokenizer_config.json"
        self._backend.save(str(whole))
        text = json.dumps(self._stored(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        settings_file.write_text(text, encoding="utf-8")
        return (str(settings_file), str(whole), *parts)

    def _stored(self) -> dict[str, Any]:
        """Return what tokenizer_config.json shall hold: what was read, brought up to date."""
        limit = self.model_max_length
        now = {
            **self._roles,
            **self._algorithm.stored_rules(self._backend),
            "model_max_length": limit if limit < NO_LIMIT else None,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "additional_special_tokens": self.additional_special_tokens or None,
            "added_tokens_decoder": {str(n): _as_dict(token) for n, token in self._added()},
            "tokenizer_class": self._algorithm.published_name or self._published_name,
        }
        settings = {**self._settings, "extra_special_tokens": None, **now}
        return {name: value for name, value in settings.items() if value is not None}


def copy_rules(backend: Tokenizer) -> Tokenizer:
    """Return a tokenizer with the same rules and tokens that shares the model, for other limits.

    It costs microseconds, and nothing that is set on it can disturb a call in another thread.
    """
    copy = Tokenizer(backend.model)
    if backend.normalizer is not None:
        copy.normalizer = backend.normalizer
    copy.pre_tokenizer = backend.pre_tokenizer
    copy.post_processor = backend.post_processor
    copy.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    return copy


def _check_settings(settings: Mapping[str, Any]) -> None:
    for name in settings.keys() - set(_SETTINGS):
        raise TokenizerError(f"a tokenizer has no setting {name!r}{did_you_mean(name, _SETTINGS)}")


def _check_rules(algorithm: Algorithm, settings: Mapping[str, Any]) -> None:
    """Refuse rules that a caller names and that the algorithm does not have."""
    foreign = {*ByteLevelBPE.rules, *WordPiece.rules} - set(algorithm.rules)
    for name in sorted(settings.keys() & foreign):
        raise TokenizerError(
            f"{name} has no effect on this tokenizer; what can be set of its rules is "
            f"{', '.join(algorithm.rules) or 'none: they are those of its tokenizer.json'}"
        )


def _role_tokens(algorithm: Algorithm, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the token of each role; unless named, a twin's, or the algorithm's own."""
    given = {role: _content(settings[role]) for role in _ROLES if settings.get(role) is not None}
    copied = {role: given[twin] for role, twin in algorithm.twins.items() if twin in given}
    return {**algorithm.roles, **copied, **given}


def _add_stored(backend: Tokenizer, settings: Mapping[str, Any], *, is_bare: bool) -> None:
    """Add the tokens that the settings know and the backend does not, under the ids they give.

    What tokenizer.json says of a token it holds, such as which space goes with it, is left alone.
    """
    stored = settings.get("added_tokens_decoder") or {}
    for number, token in sorted((int(n), token) for n, token in stored.items()):
        if is_bare or backend.token_to_id(token["content"]) is None:
            backend.add_tokens([AddedToken(**{n: token[n] for n in _FIELDS if n in token})])
        found = backend.token_to_id(token["content"])
        if found != number:
            raise TokenizerError(
                f"the settings give the added token {token['content']!r} the id {number}, and the "
                f"vocabulary {found}; take the files of one and the same tokenizer"
            )
    known = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    extra = [_content(token) for name in _EXTRA for token in settings.get(name) or []]
    backend.add_special_tokens([_special(token) for token in extra if token not in known])


def _known_id(backend: Tokenizer, token: str) -> int:
    number = backend.token_to_id(token)
    assert number is not None, f"{token!r} was checked when it was given a role"
    return int(number)


def _special(token: str, lstrip: bool = False) -> AddedToken:
    return AddedToken(token, lstrip=lstrip, normalized=False, special=True)


def _as_dict(token: AddedToken) -> dict[str, Any]:
    return {name: getattr(token, name) for name in _FIELDS}


def _content(token: Any) -> str:
    """Return the text of a token, which files hold as a string or as an object."""
    return str(token["content"] if isinstance(token, dict) else getattr(token, "content", token))
