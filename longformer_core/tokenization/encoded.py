"""What the bulk calls of a tokenizer return: numpy arrays of one text each.

Shapes: n tokens. All integers are int32.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]


class EncodedText(NamedTuple):
    """The tokens of a whole text without special ones; token i is `text[starts[i]:ends[i]]`."""

    ids: IntArray
    starts: IntArray
    ends: IntArray


class EncodedWords(NamedTuple):
    """The tokens of a list of words without special ones; token i is of word `words[i]`."""

    ids: IntArray
    words: IntArray


class ModelInput(NamedTuple):
    """Ids with the special tokens around them; `starts` has the slot of each text's first token."""

    ids: IntArray
    token_type_ids: IntArray
    starts: tuple[int, ...]
