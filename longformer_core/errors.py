"""The exceptions a caller can meet, what each one means, and hints that are given once.

    LongformerError                  anything this package raises on purpose
    ├── ConfigError                  a setting is unknown, missing, or out of its range
    ├── ShapeError                   tensors or lengths that do not fit together
    ├── CheckpointError              a model directory or its weights cannot be used
    ├── TokenizerError               a vocabulary or tokenizer file cannot be used
    ├── TooLongError                 a document or an output exceeds the model's positions
    ├── NonFiniteError               a document's numbers became NaN or infinite
    ├── OutOfMemoryError             one document alone does not fit on the device
    ├── DeadlineError                a document was not decoded in the time it was given
    └── CancelledError               a document was cancelled while it was decoded or waited

Each is also the built-in error a reader would expect (ValueError, ArithmeticError, MemoryError,
TimeoutError), so callers can catch either. A message names what is wrong, the value, the limit, and
the remedy.
"""

import difflib
import functools
import logging
from collections.abc import Iterable


class LongformerError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(LongformerError, ValueError):
    """A setting is unknown, missing, or outside its range."""


class ShapeError(LongformerError, ValueError):
    """Tensors, lengths or positions do not fit together."""


class CheckpointError(LongformerError, ValueError):
    """A model directory or the weights in it cannot be used."""


class TokenizerError(LongformerError, ValueError):
    """A vocabulary or tokenizer file cannot be used."""


class TooLongError(LongformerError, ValueError):
    """A document or a requested output is longer than the model has positions."""


class NonFiniteError(LongformerError, ArithmeticError):
    """The numbers of one document became NaN or infinite."""


class OutOfMemoryError(LongformerError, MemoryError):
    """One document alone does not fit into the device's memory."""


class DeadlineError(LongformerError, TimeoutError):
    """A document was not decoded in the time it was given."""


class CancelledError(LongformerError):
    """A document was cancelled while it was decoded, or before."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


@functools.cache
def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log a message, once in the life of the process."""
    logger.log(level, message)
