"""Every error can be caught as ours and as the built-in that a reader expects."""

import pytest

from longformer_core import errors


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("ShapeError", ValueError),
        ("CheckpointError", ValueError),
        ("TokenizerError", ValueError),
        ("TooLongError", ValueError),
        ("NonFiniteError", ArithmeticError),
        ("OutOfMemoryError", MemoryError),
    ],
)
def test_each_error_is_ours_and_a_builtin(name: str, builtin: type[Exception]) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.LongformerError)
    assert issubclass(kind, builtin)
    assert name in str(errors.__doc__)


def test_hint_names_the_closest_option_or_nothing() -> None:
    assert errors.did_you_mean("num_beam", ["top_k", "num_beams"]) == (
        " (did you mean 'num_beams'?)"
    )
    assert errors.did_you_mean("zzz", ["top_k"]) == ""
