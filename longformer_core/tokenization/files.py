"""The files of a tokenizer: which there are in a directory, and what is read from each.

`tokenizer.json` holds everything; `vocab.json` with `merges.txt` is a bare byte-level BPE, and
`vocab.txt` a bare WordPiece. Settings are in `tokenizer_config.json`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from longformer_core.config.base import read_json
from longformer_core.errors import ConfigError, TokenizerError


def read_settings(path: Path) -> dict[str, Any]:
    """Merge the settings of a directory; the files of older releases come first.

    Raises: TokenizerError for a damaged file.
    """
    settings: dict[str, Any] = {}
    try:
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            settings |= read_json(path / name) if (path / name).exists() else {}
        added = path / "added_tokens.json"
        if added.exists():
            stored = {str(n): {"content": token} for token, n in read_json(added).items()}
            settings["added_tokens_decoder"] = stored | settings.get("added_tokens_decoder", {})
    except ConfigError as error:
        raise TokenizerError(str(error)) from error
    return settings


def read_backend(path: Path) -> Tokenizer:
    """Read the tokenizer of a directory.

    Raises: TokenizerError when there is none, when it is damaged, and for SentencePiece's own file.
    """
    whole, vocab, merges, words = (
        path / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
    )
    if whole.exists():
        return read_whole(whole)
    if vocab.exists() and merges.exists():
        return read_parts(vocab, merges)
    if words.exists():
        return _made(
            lambda: Tokenizer(models.WordPiece.from_file(str(words), unk_token="[UNK]")),
            f"{words} cannot be read",
        )
    pieces = sorted(file.name for file in path.glob("*.model"))
    if pieces:
        raise TokenizerError(
            f"{path} has SentencePiece's {pieces[0]} and no tokenizer.json, which alone is read "
            "here; load the directory with transformers' AutoTokenizer and save it again"
        )
    raise TokenizerError(
        f"{path} has no tokenizer; put tokenizer.json, or vocab.json and merges.txt, or vocab.txt "
        "there"
    )


def read_whole(file: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises: TokenizerError when it is damaged."""
    return _made(lambda: Tokenizer.from_file(str(file)), f"{file} cannot be read")


def read_parts(vocab: Path, merges: Path) -> Tokenizer:
    """Read a bare byte-level BPE. Raises: TokenizerError when the files are of different ones."""
    return _made(
        lambda: Tokenizer(models.BPE.from_file(str(vocab), str(merges))),
        f"{vocab} and {merges} do not fit together",
    )


def _made(make: Callable[[], Tokenizer], problem: str) -> Tokenizer:
    try:
        return make()
    except Exception as error:  # the library raises no narrower class
        raise TokenizerError(f"{problem}: {error}; save the tokenizer again") from error
