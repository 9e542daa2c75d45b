"""Texts as callers give them: alone, in pairs, in batches, as words; and what is none."""

from collections.abc import Iterable
from typing import Any

from longformer_core.errors import TokenizerError


def rows_of(text: Any, pair: Any, is_split: bool) -> tuple[list[Any], bool]:
    """Return the rows to encode, pairs as tuples, and whether the caller gave a batch."""
    is_batch = isinstance(text, list | tuple)
    if is_split:
        is_batch = is_batch and bool(text) and isinstance(text[0], list | tuple)
    if not is_batch:
        return [text if pair is None else (text, pair)], False
    if pair is None:
        return list(text), True
    if isinstance(pair, str) or len(pair) != len(text):
        found = "one text" if isinstance(pair, str) else f"{len(pair)} texts"
        raise TokenizerError(f"a batch of {len(text)} texts needs as many text_pair, not {found}")
    return list(zip(text, pair, strict=True)), True


def what_is_no_text(rows: list[Any]) -> str:
    """Return what is wrong with rows that the library does not take for texts."""
    for number, row in enumerate(rows):
        for text in _leaves(row):
            if not isinstance(text, str):
                return f"row {number} holds {type(text).__name__} where a string belongs"
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                return (
                    f"row {number} is not valid Unicode, it holds half of a surrogate pair; decode "
                    "the source with errors='replace'"
                )
    return "a row is neither a text nor a pair; lists of words need is_split_into_words=True"


def _leaves(row: Any) -> Iterable[Any]:
    if isinstance(row, list | tuple):
        for part in row:
            yield from _leaves(part)
    else:
        yield row
