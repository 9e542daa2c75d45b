"""Which tokens are global: masks for the padded batches of the published interface.

A global token attends to its whole document and is attended to by all of it. Every function returns
a `global_attention_mask` [B, S] of 0 and 1 (int64, on the device of its input). A mark on a padded
slot has no effect, for `attention_mask` wins.
Shape letters: B documents, S slots of each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longformer_core.errors import ShapeError
from longformer_core.layout import default_global_positions


def mark_first_token(tokens: Tensor) -> Tensor:
    """Make each document's first token global, as classification and summarization do.

    Shapes: tokens [B, S] ids, or [B, S, d] embeddings.
    """
    mask = torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    mask[:, list(default_global_positions(tokens.shape[1]))] = 1
    return mask


def mark_question(input_ids: Tensor, separator: int | None) -> Tensor:
    """Make all tokens before each row's first separator global, as question answering does.

    Serves `<s> question </s></s> document </s>`, the published tokenizer's pair, and
    `<s> question </s> document </s>`, which AI2 trained with, alike.
    Shapes: input_ids [B, S]. Raises: ShapeError when a row has no separator.
    """
    return (_slots(input_ids) < _first_separators(input_ids, separator)).long()


def mark_choice(input_ids: Tensor, separator: int | None) -> Tensor:
    """Make all tokens after each row's first single or double separator global.

    In multiple choice that is the choice's own text, in both layouts of `mark_question`.
    Shapes: input_ids [B, S], one row per choice. Raises: ShapeError when a row has no separator.
    """
    ends = _first_separators(input_ids, separator)
    after = (ends + 1).clamp(max=input_ids.shape[1] - 1)
    is_double = input_ids.gather(1, after).eq(input_ids.gather(1, ends))
    return (_slots(input_ids) > ends + is_double.long()).long()


def mark_spans(offsets: Tensor, spans: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Make every token global that shares a character with a span of its document.

    Shapes: offsets [B, S, 2], first character and the one after the last of each token, as
        tokenizers return them; tokens without characters, such as special ones, are never marked.
        In pairs of texts both count from 0: set the offsets of the other text to zeros.
    Units: spans are (start, end) in characters, end excluded; any number for each document.
    Raises: ShapeError when there is not one list of spans per document, or a span is empty.
    """
    if offsets.dim() != 3 or offsets.shape[2] != 2:
        raise ShapeError(f"offsets have shape {list(offsets.shape)}; give [documents, slots, 2]")
    if len(spans) != len(offsets):
        raise ShapeError(
            f"spans are given for {len(spans)} documents but offsets for {len(offsets)}; give one "
            "list per document, empty where there is none"
        )
    starts, ends = offsets.unbind(2)
    mask = torch.zeros_like(starts, dtype=torch.int64)
    for row, document in enumerate(spans):
        for start, end in document:
            if not 0 <= start < end:
                raise ShapeError(
                    f"document {row} has a span from {start} to {end}; a span starts at 0 or later "
                    "and ends after its start"
                )
            mask[row] |= ((starts[row] < end) & (ends[row] > start)).long()
    return mask * (starts < ends)


def _slots(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None]


def _first_separators(input_ids: Tensor, separator: int | None) -> Tensor:
    """Return the position [B, 1] of each row's first separator."""
    is_separator = input_ids.eq(-1 if separator is None else separator)
    if not bool(is_separator.any(1).all()):
        raise ShapeError(
            f"a row has no separator token (id {separator}), so the question's end is unknown; "
            "give global_attention_mask"
        )
    return is_separator.int().argmax(1, keepdim=True)
