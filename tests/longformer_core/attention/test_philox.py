"""The counter-based generator: its published words, Triton's words, and an even draw."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longformer_core.attention.philox import is_kept, philox

SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 0x299F31D0A4093822, 2**63 - 1]


def words(seed: int, *counter: int) -> list[int]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return [int(word) for word in philox(seed, (c0, c1, c2, c3))]


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [
        (0, [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            2**64 - 1,
            [2**32 - 1] * 4,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            0x299F31D0A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_published_words(seed: int, counter: list[int], expected: list[int]) -> None:
    """Random123's known answers."""
    assert words(seed, *counter) == expected


def by_numbers(seed: int, counter: list[int], bits: int) -> list[int]:
    """Philox-4xW-10 in Python's own whole numbers; numpy has the form of 64-bit words."""
    multipliers, weyl = {
        32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
        64: (
            (0xD2E7470EE14C6C93, 0xCA5A826395121157),
            (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B),
        ),
    }[bits]
    word = 2**bits - 1
    c, key = list(counter), [seed & word, seed >> bits & word]
    for _ in range(10):
        one, two = c[0] * multipliers[0], c[2] * multipliers[1]
        c = [two >> bits ^ c[1] ^ key[0], two & word, one >> bits ^ c[3] ^ key[1], one & word]
        key = [(k + w) & word for k, w in zip(key, weyl, strict=True)]
    return c


def test_the_same_rounds_in_words_of_64_bits_are_numpys() -> None:
    key, counter = [2**63 + 5, 77], [3, 2**62, 9, 1]
    # numpy counts one further before it draws.
    before = np.array([counter[0] - 1, *counter[1:]], dtype=np.uint64)
    stream = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=before)
    expected = [int(x) for x in stream.random_raw(4)]
    assert by_numbers(key[1] << 64 | key[0], counter, 64) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_any_counter_gives_the_word_of_plain_arithmetic(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**32)
    counters = torch.randint(2**32, (50, 4), generator=generator)
    found = torch.stack(philox(seed, tuple(counters.unbind(1))), 1)  # type: ignore[arg-type]
    assert found.tolist() == [by_numbers(seed, c, 32) for c in counters.tolist()]


PROGRAM = """
import json, sys, torch, triton, triton.language as tl

@triton.jit
def words(seed, i, j, h, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    word, _, _, _ = tl.philox(seed, tl.load(j + at), tl.load(i + at), tl.load(h + at), 0)
    tl.store(out + at, word.to(tl.int64))

i, j, h = (torch.tensor(x, dtype=torch.int32) for x in json.loads(sys.argv[1]))
found = []
for seed in json.loads(sys.argv[2]):
    out = torch.empty(len(i), dtype=torch.int64)
    words[(1,)](seed, i, j, h, out, len(i))
    found.append(out.tolist())
print(json.dumps(found))
"""


def test_tritons_words_are_the_same(tmp_path: Path) -> None:
    """In another process: the interpreter is chosen when Triton is loaded."""
    (tmp_path / "program.py").write_text(PROGRAM)
    i, j, h = [0, 1, 5, 70_000], [0, 9, 5, 131_071], [0, 1, 11, 15]
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", json.dumps([i, j, h]), json.dumps(SEEDS)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = [
        [words(seed, *counter)[0] for counter in zip(j, i, h, [0] * 4, strict=True)]
        for seed in SEEDS
    ]
    assert json.loads(done.stdout) == expected


def test_what_is_kept_is_the_first_words_comparison() -> None:
    queries, keys = torch.tensor([7, 100_000]), torch.tensor([0, 8, 100_001])
    kept = is_kept(0.3, SEEDS[-1], queries, keys, 2)
    assert kept.shape == (2, 2, 3)
    for h in range(2):
        for row, i in enumerate(queries.tolist()):
            for column, j in enumerate(keys.tolist()):
                word = words(SEEDS[-1], j, i, h, 0)[0]
                assert bool(kept[h, row, column]) == (word >= int(0.3 * 2**32))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_the_share_dropped_is_the_chance(p: float) -> None:
    slots = torch.arange(200)
    kept = is_kept(p, 3, slots, slots, 4)
    spread = (p * (1 - p) / kept.numel()) ** 0.5
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=5 * spread)
