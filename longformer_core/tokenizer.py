"""Text to ids and back: RoBERTa's byte-level BPE, which LED shares, over the `tokenizers` library.

Whole documents are encoded, never a part of one: what to cut, and saying so, is up to the caller.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from longformer_core.config import read_json
from longformer_core.errors import ConfigError, TokenizerError

if TYPE_CHECKING:
    import pyarrow as pa

# The library holds some hundred bytes per token while a batch is encoded. This many bytes of text
# at a time keep every core busy with documents and stay below half a gigabyte.
_BATCH_BYTES = 4 << 20

_ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


class LEDTokenizerFast:
    """Encode documents as `<s> text </s>`, and decode what the model writes.

    Special tokens written out in a text ("</s>") become their ids, as in the published tokenizer.
    Raises: TokenizerError for files that are missing, damaged, or lack a special token.
    Source: the RoBERTa layout of transformers' `LEDTokenizer`; `<mask>` takes the space before it.
    """

    def __init__(self, backend: Tokenizer, settings: dict[str, Any] | None = None) -> None:
        self._backend = backend
        self._settings = dict(settings or {})
        # A stored tokenizer may carry the limits of the run that saved it.
        backend.no_truncation()
        backend.no_padding()
        ids = {role: pair[1] for role, pair in _special_tokens(backend, self._settings).items()}
        self.bos_token_id = ids["bos_token"]
        self.eos_token_id = ids["eos_token"]
        self.pad_token_id = ids["pad_token"]
        self.unk_token_id = ids["unk_token"]
        self.mask_token_id = ids["mask_token"]

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read `tokenizer.json`, or else `vocab.json` and `merges.txt`, of a local directory."""
        path = Path(directory)
        settings_path = path / "tokenizer_config.json"
        try:
            settings = read_json(settings_path) if settings_path.exists() else {}
        except ConfigError as error:
            raise TokenizerError(str(error)) from error
        return cls(_read_backend(path, settings), settings)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files that this class, and transformers' AutoTokenizer, read to equal ids."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(path / "tokenizer.json"))
        self._backend.model.save(str(path))
        settings = {
            "add_prefix_space": False,
            "model_max_length": None,
            **_ROLES,
            "cls_token": _content(self._settings.get("bos_token", _ROLES["bos_token"])),
            "sep_token": _content(self._settings.get("eos_token", _ROLES["eos_token"])),
            **self._settings,
            "tokenizer_class": "LEDTokenizer",
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (path / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, special tokens included; every id is below it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a whole document, with `<s>` and `</s>`."""
        return self._encode_batch([text])[0].ids  # type: ignore[no-any-return]

    def encode_arrow(self, texts: "pa.Array | pa.ChunkedArray") -> "pa.LargeListArray":
        """Return the ids of each document, with `<s>` and `</s>`, as Arrow lists; null for null.

        Documents are spread over all cores. Memory above the result is bounded by a few megabytes
        of text at a time, or by the longest document.
        Shapes: n strings (string or large_string) to n lists of int32.
        Raises: TokenizerError for another type of array, and for bytes that are not UTF-8.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
            raise TokenizerError(
                f"encode_arrow takes string or large_string, not {texts.type}; cast the column"
            )
        sizes = pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)
        is_valid = texts.is_valid().to_numpy(zero_copy_only=False)
        lengths = np.zeros(len(texts), dtype=np.int64)
        parts = [np.zeros(0, dtype=np.int32)]
        for start, stop in _spans(sizes):
            rows = start + np.flatnonzero(is_valid[start:stop])
            documents = _strings(texts.slice(start, stop - start).drop_null(), start)
            encodings = self._encode_batch(documents)
            lengths[rows] = [len(encoding) for encoding in encodings]
            parts.extend(np.array(encoding.ids, dtype=np.int32) for encoding in encodings)
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        values = pa.array(np.concatenate(parts))
        return pa.LargeListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~is_valid))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return self.batch_decode([ids], skip_special_tokens)[0]

    def batch_decode(
        self, sequences: Iterable[Sequence[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        """Return the text of each sequence of ids, on all cores."""
        rows = [[int(i) for i in ids] for ids in sequences]
        try:
            texts = self._backend.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise TokenizerError(
                f"an id is negative or beyond 32 bits; ids lie in [0, {self.vocab_size}); "
                "remove label padding such as -100 first"
            ) from error
        return list(texts)

    def _encode_batch(self, texts: list[str]) -> list[Any]:
        try:
            return list(self._backend.encode_batch_fast(texts))
        except TypeError as error:
            raise TokenizerError(
                "a text is not a string of valid Unicode (it may hold half of a surrogate pair); "
                "decode the source with errors='replace'"
            ) from error


LEDTokenizer = LEDTokenizerFast


def _read_backend(path: Path, settings: dict[str, Any]) -> Tokenizer:
    whole, vocab, merges = (path / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.exists():
        try:
            return Tokenizer.from_file(str(whole))
        except Exception as error:  # the library raises no narrower class
            raise TokenizerError(f"{whole} cannot be read: {error}; save it again") from error
    if not (vocab.exists() and merges.exists()):
        raise TokenizerError(
            f"{path} has no tokenizer; put tokenizer.json, or vocab.json and merges.txt, there"
        )
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises no narrower class
        raise TokenizerError(f"{vocab} and {merges} do not fit together: {error}") from error
    return _build(model, settings)


def _build(model: models.BPE, settings: dict[str, Any]) -> Tokenizer:
    """Put RoBERTa's layout around a byte-level BPE."""
    backend = Tokenizer(model)
    tokens = _special_tokens(backend, settings)
    add_prefix_space = bool(settings.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(
        tokens["eos_token"], tokens["bos_token"], add_prefix_space=add_prefix_space
    )
    backend.add_special_tokens(
        [
            AddedToken(token, lstrip=role == "mask_token", normalized=False, special=True)
            for role, (token, _) in tokens.items()
        ]
    )
    return backend


def _special_tokens(backend: Tokenizer, settings: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Return text and id of the token in each role."""
    found = {}
    for role, usual in _ROLES.items():
        token = _content(settings.get(role, usual))
        number = backend.token_to_id(token)
        if number is None:
            raise TokenizerError(
                f"the vocabulary has no {role} {token!r}; add it to the vocabulary, or name "
                f"the right one as {role} in tokenizer_config.json"
            )
        found[role] = (token, int(number))
    return found


def _content(token: Any) -> str:
    """Return the text of a token that tokenizer_config.json holds as a string or as an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _strings(texts: "pa.Array | pa.ChunkedArray", first_row: int) -> list[str]:
    try:
        return list(texts.to_pylist())
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"a text at or after row {first_row} is not valid UTF-8: {error}; decode the source "
            "with errors='replace'"
        ) from error


def _spans(sizes: np.ndarray) -> Iterable[tuple[int, int]]:
    """Cut rows into runs of about `_BATCH_BYTES` of text; a longer row stands alone."""
    start, total = 0, 0
    for row, size in enumerate(sizes.tolist()):
        if row > start and total + size > _BATCH_BYTES:
            yield start, row
            start, total = row, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)
