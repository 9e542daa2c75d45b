"""What may be wrong with a document, found before anything is computed."""

from collections.abc import Sequence

import torch

from longformer_core.errors import ShapeError, TooLongError
from longformer_core.scheduling.handle import DocumentRequest


def check_document(request: DocumentRequest, *, vocab_size: int, max_length: int) -> None:
    """Make sure that a model can read a document.

    Raises: ShapeError for ids outside the vocabulary, no ids at all, positions outside the
        document, and another number of flags than tokens; TooLongError beyond `max_length` tokens.
    """
    num_tokens = len(request.input_ids)
    if num_tokens == 0:
        raise ShapeError("the document has no tokens; give at least one")
    if num_tokens > max_length:
        raise TooLongError(
            f"the document has {num_tokens} tokens but the model has {max_length} positions; "
            "shorten it or choose a model with more positions"
        )
    check_token_ids("token ids", request.input_ids, vocab_size)
    check_positions("global_positions", request.global_positions or (), num_tokens)
    if request.valid is not None and len(request.valid) != num_tokens:
        raise ShapeError(
            f"valid has {len(request.valid)} flags but the document has {num_tokens} tokens; give "
            "one for each"
        )


def check_token_ids(name: str, ids: Sequence[int], limit: int) -> None:
    """Raise ShapeError unless ids, at least one, are one list of numbers from 0 to limit - 1."""
    try:
        given = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"the document's {name} are no whole numbers: {error}") from error
    if given.dim() != 1 or given.is_floating_point():
        raise ShapeError(
            f"the document's {name} are a {given.dim()}-dimensional tensor of {given.dtype}; give "
            "one list of whole numbers"
        )
    least, most = int(given.min()), int(given.max())
    if least < 0 or most >= limit:
        raise ShapeError(
            f"the document's {name} reach from {least} to {most}; they must be from 0 to "
            f"{limit - 1}"
        )


def check_positions(name: str, positions: Sequence[int], num_tokens: int) -> None:
    """Raise ShapeError for a position outside the document."""
    if not all(0 <= position < num_tokens for position in positions):
        raise ShapeError(
            f"{name} are {list(positions)} but the document has {num_tokens} tokens, counted from 0"
        )
