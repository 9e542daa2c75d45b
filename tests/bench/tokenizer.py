"""What Arrow in and Arrow out costs beside the `tokenizers` library alone.

    python -m tests.bench.tokenizer [--tokens 10000] [--documents 64] [--rounds 7]

Documents of about `--tokens` tokens, cut from the test corpus, are encoded by
`[e.ids for e in backend.encode_batch_fast(texts)]` and by `encode_arrow` in turn, in one process,
both on all cores. The ids are compared first; then the ratio of the medians is printed: how fast
the Arrow path is, of the library's speed.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from longformer_core.tokenization.tokenizer import LEDTokenizer
from tests.helpers import all_texts, tokenizer_directory

GOAL = 0.95


def documents(tokenizer: LEDTokenizer, num_tokens: int, count: int) -> list[str]:
    """Cut the corpus, laid end to end, into documents of about `num_tokens` tokens."""
    sample = "".join(all_texts()[:20])[:1_000_000]
    per_token = len(sample) / len(tokenizer.encode(sample))
    size = int(num_tokens * per_token)
    texts, rest = [], ""
    for text in all_texts():
        rest += text
        while len(rest) >= size and len(texts) < count:
            texts.append(rest[:size])
            rest = rest[size:]
    return texts


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def bench(num_tokens: int, count: int, rounds: int) -> None:
    tokenizer = LEDTokenizer.from_pretrained(tokenizer_directory())
    texts = documents(tokenizer, num_tokens, count)
    column = pa.array(texts, pa.large_string())
    backend = tokenizer.backend_tokenizer

    def library() -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts)]

    def arrow() -> pa.LargeListArray:
        return tokenizer.encode_arrow(column)

    expected = library()
    assert arrow().to_pylist() == expected, "the ids disagree: no speed is printed"
    total = sum(map(len, expected))
    library_s, arrow_s = [], []
    for _ in range(rounds):
        library_s.append(seconds(library))
        arrow_s.append(seconds(arrow))
        emit("round", library_s=library_s[-1], arrow_s=arrow_s[-1])
    ratio = statistics.median(library_s) / statistics.median(arrow_s)
    emit(
        "speed",
        documents=len(texts),
        tokens_per_document=round(total / len(texts)),
        rounds=rounds,
        library_tokens_per_s=round(total / statistics.median(library_s)),
        arrow_tokens_per_s=round(total / statistics.median(arrow_s)),
        arrow_over_library=round(ratio, 3),
        goal=GOAL,
    )


def emit(kind: str, **values: Any) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("tokenizers", "pyarrow")}
    line = {"bench": "tokenizer", "kind": kind} | values
    print(json.dumps(line | {"cores": os.cpu_count(), "versions": versions}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    bench(given.tokens, given.documents, given.rounds)


if __name__ == "__main__":
    main()
