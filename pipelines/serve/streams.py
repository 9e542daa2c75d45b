"""Text as it becomes certain, and server-sent events."""

import json
from collections.abc import Mapping
from typing import Any


class TextStream:
    """Token ids in, text out: never a piece that later ids would change.

    >>> stream = TextStream(tokenizer)
    >>> stream.add([100]) + stream.add([101, 102]) + stream.rest("some text")
    'some text'
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Ids before the first are told and closed; those up to the second are told.
        self._closed, self._told = 0, 0
        self._text = ""

    def add(self, ids: list[int]) -> str:
        """Return the text that is new; nothing while a character is not complete."""
        self._ids += ids
        before = self._decode(self._closed, self._told)
        now = self._decode(self._closed, len(self._ids))
        if now.endswith("\ufffd") or not now.startswith(before):
            return ""
        # A few ids before the new ones decide how those are read; older ones do not.
        self._closed, self._told = self._told, len(self._ids)
        self._text += now[len(before) :]
        return now[len(before) :]

    def rest(self, whole: str) -> str:
        """Return what is left to tell of the whole text."""
        assert whole.startswith(self._text), "a text changed after it was told"
        return whole[len(self._text) :]

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))


def event(data: Mapping[str, Any] | str, name: str | None = None) -> bytes:
    """Return one server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"{f'event: {name}{chr(10)}' if name else ''}data: {text}\n\n".encode()
