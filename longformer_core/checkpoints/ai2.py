"""Weights of the original release under the names that were published later."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# What the original code called the model without its head.
_FIRST_PREFIX = {"longformer": "roberta.", "led": "model."}


# Rows of BART's position tables before that of the first token.
_UNUSED_ROWS = 2


def published_weights(weights: Mapping[str, "Tensor"], base: str) -> dict[str, "Tensor"]:
    """Return weights under their published names; those not of the original release unchanged.

    A training checkpoint may hold the model in `model`, with a head inside it or beside it.
    base: the attribute that holds a model without its head, `longformer` or `led`.
    """
    first = _FIRST_PREFIX[base]
    wrapped = any(name.startswith((f"model.{first}", f"model.{base}.")) for name in weights)
    found = {name.removeprefix("model." if wrapped else ""): t for name, t in weights.items()}
    if not any(name.startswith((first, "model.")) for name in found):
        return found
    renamed = {}
    for name, tensor in found.items():
        if base == "led" and name.endswith(".embed_positions.weight"):
            tensor = tensor[_UNUSED_ROWS:]
        renamed[re.sub(rf"^({re.escape(first)}|model\.)", f"{base}.", name)] = tensor
    return renamed
