import pytest
import torch

from longformer_core.errors import ShapeError
from longformer_core.layout import Layout, default_global_positions
from tests.helpers import run_example


def test_the_example_runs() -> None:
    run_example(Layout)


def test_positions_restart_in_each_document() -> None:
    layout = Layout.from_lengths([3, 0, 2])

    assert layout.cu_seqlens == (0, 3, 3, 5)
    assert layout.offsets.tolist() == [0, 3, 3, 5]
    assert layout.positions.tolist() == [0, 1, 2, 0, 1]
    assert (layout.num_documents, layout.num_tokens, layout.lengths) == (3, 5, (3, 0, 2))
    assert layout.is_valid is None
    assert layout.is_visible is None


def test_global_positions_become_sorted_distinct_slots() -> None:
    layout = Layout.from_lengths([3, 4], [[2, 0, 2], [3]])

    assert layout.global_positions == ((0, 2), (3,))
    assert layout.global_index.tolist() == [0, 2, 6]
    assert layout.num_globals == (2, 1)


def test_an_invalid_token_is_not_global() -> None:
    valid = torch.tensor([False, True, True])

    layout = Layout.from_lengths([3], [[0, 1]], valid)

    assert layout.global_positions == ((1,),)
    assert layout.is_valid is not None
    assert layout.is_valid.tolist() == [False, True, True]


def test_visible_follows_valid_unless_given() -> None:
    valid = torch.tensor([1, 0, 1])

    same = Layout.from_lengths([3], valid=valid)
    apart = Layout.from_lengths([3], valid=valid, visible=torch.ones(3))

    assert same.is_visible is not None
    assert same.is_visible.tolist() == [True, False, True]
    assert apart.is_visible is None


def test_flags_that_are_all_true_are_dropped() -> None:
    assert Layout.from_lengths([2, 1], valid=torch.ones(3, dtype=torch.bool)).is_valid is None


def test_a_plan_is_built_once_per_key() -> None:
    layout = Layout.from_lengths([1])
    built: list[str] = []

    for key in ("a", "b", "a"):
        layout.plan(key, lambda key=key: built.append(key))

    assert built == ["a", "b"]


@pytest.mark.parametrize(
    ("lengths", "positions", "valid", "message"),
    [
        ([2, -1], None, None, "none may be negative"),
        ([2], [[2]], None, "document 0 has 2 tokens .* position 2"),
        ([2], [[-1]], None, "position -1"),
        ([0], [[0]], None, "document 0 has 0 tokens"),
        ([2, 2], [[0]], None, "given for 1 documents but the batch has 2"),
        ([2, 2], None, torch.ones(3), r"shape \[3\]; give one flag per packed token, \[4\]"),
    ],
)
def test_what_does_not_fit_is_named(
    lengths: list[int],
    positions: list[list[int]] | None,
    valid: torch.Tensor | None,
    message: str,
) -> None:
    with pytest.raises(ShapeError, match=message):
        Layout.from_lengths(lengths, positions, valid)


def test_the_first_token_is_global_by_default() -> None:
    assert default_global_positions(5) == (0,)
    assert default_global_positions(0) == ()
