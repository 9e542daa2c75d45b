"""Texts that are told piece by piece."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longformer_core.tokenization.tokenizer import load_tokenizer
from pipelines.serve.streams import TextStream, event


@pytest.fixture(scope="module")
def tokenizer(led_directory: Path) -> Any:
    return load_tokenizer(led_directory)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé€😀 \n"))),
    sizes=st.lists(st.integers(1, 4), min_size=1),
)
def test_pieces_make_the_whole(tokenizer: Any, text: str, sizes: list[int]) -> None:
    ids = tokenizer.encode(text)
    stream, told, place = TextStream(tokenizer), "", 0
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    while place < len(ids):
        size = sizes[place % len(sizes)]
        told += stream.add(ids[place : place + size])
        assert whole.startswith(told)
        place += size
    assert told + stream.rest(whole) == whole


def test_plain_text_comes_at_once(tokenizer: Any) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("One word after another", add_special_tokens=False)
    assert [stream.add([i]) for i in ids] == [tokenizer.decode([i]) for i in ids]


def test_events() -> None:
    assert event({"a": "ü\n"}) == b'data: {"a": "\xc3\xbc\\n"}\n\n'
    assert event("[DONE]", "end") == b"event: end\ndata: [DONE]\n\n"
