"""Columns of encoded texts brought to one length, and columns of arrays and tensors as lists."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from longformer_core.errors import TokenizerError

# What padding is made of, beside ids. In a global mask 0 means local attention, so padding needs
# another value.
FILLS = {
    "attention_mask": 0,
    "token_type_ids": 0,
    "special_tokens_mask": 1,
    "global_attention_mask": -1,
}


def plain_columns(encoded: Any) -> tuple[dict[str, Any], str | None]:
    """Return columns as lists of ints, and the kind of tensor that they came as.

    Raises: TokenizerError for rows of different columns, and when there are no `input_ids`.
    """
    if not isinstance(encoded, Mapping):
        rows = list(encoded)
        names = rows[0].keys() if rows else ("input_ids",)
        if any(row.keys() != names for row in rows):
            raise TokenizerError("rows to be padded together must have the same columns")
        encoded = {name: [row[name] for row in rows] for name in names}
    if "input_ids" not in encoded:
        raise TokenizerError(f"there are no input_ids to pad among {sorted(encoded)}")
    ids = encoded["input_ids"]
    first = ids if hasattr(ids, "tolist") or not len(ids) else ids[0]
    kind = "np" if isinstance(first, np.ndarray) else "pt" if hasattr(first, "tolist") else None
    return {name: plain(column) for name, column in encoded.items()}, kind


def plain(values: Any) -> Any:
    """Return arrays and tensors, and lists of them, as lists of numbers."""
    if hasattr(values, "tolist"):
        return values.tolist()
    is_nested = isinstance(values, list | tuple) and values and hasattr(values[0], "tolist")
    return [value.tolist() for value in values] if is_nested else values


def filled(row: list[int], length: int, fill: int, side: str) -> list[int]:
    """Return a row of `length`, filled up on one side."""
    filling = [fill] * (length - len(row))
    return filling + row if side == "left" else row + filling
