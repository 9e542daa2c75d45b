"""Which attention probabilities dropout keeps, as a function of where they stand and a seed.

A counter-based generator has no state: the number of a query, a key and a head is the same in
whatever order, block or pass it is asked for, so that implementations agree with one another.
Shape letters: n queries, m keys, H heads.
"""

import torch
from torch import Tensor

_WORD = 2**32 - 1
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words that Philox-4x32-10 makes of a counter of four words.

    The key is the seed's low 32 bits and its high 32 bits.
    Shapes: the words broadcast against one another.
    Numerics: words are int64 tensors between 0 and 2**32 - 1.
    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        # Past 63 bits a product wraps around, and all its 64 bits are still right.
        one, two = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (two >> 32 & _WORD) ^ c1 ^ k0, two & _WORD
        c2, c3 = (one >> 32 & _WORD) ^ c3 ^ k1, one & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def is_kept(p: float, seed: int, queries: Tensor, keys: Tensor, num_heads: int) -> Tensor:
    """Return [H, n, m] bool, false where dropout strikes, at the chance p.

    The probability of query i for key j in head h is dropped iff the first word of the counter
    (j, i, h, 0) is below p * 2**32, rounded down.
    Shapes: queries [n] and keys [m], int64.
    Units: queries and keys are slots of the packed batch.
    """
    heads = torch.arange(num_heads, device=queries.device)
    counter = (keys, queries[:, None], heads[:, None, None], torch.zeros_like(keys))
    return philox(seed, counter)[0] >= int(p * 2**32)
