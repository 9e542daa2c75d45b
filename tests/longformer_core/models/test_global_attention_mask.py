"""Global masks of real layouts, and equality with the published helper where it accepts them."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers.models.longformer.modeling_longformer import _compute_global_attention_mask

from longformer_core.errors import ShapeError
from longformer_core.models.global_attention_mask import (
    mark_choice,
    mark_first_token,
    mark_question,
    mark_spans,
)

PAD, SEP = 1, 2
# <s> q q </s></s> d d d </s>, and the same with one separator between; <pad> to the end.
THREE = [0, 9, 9, SEP, SEP, 8, 8, 8, SEP, PAD]
TWO = [0, 9, 9, SEP, 8, 8, 8, SEP, PAD, PAD]


def positions(mask: Tensor) -> list[list[int]]:
    assert mask.dtype == torch.int64
    return [row.nonzero()[:, 0].tolist() for row in mask]


def test_the_first_token() -> None:
    assert positions(mark_first_token(torch.tensor([THREE, TWO]))) == [[0], [0]]
    assert positions(mark_first_token(torch.zeros(2, 4, 8))) == [[0], [0]]
    assert mark_first_token(torch.zeros(2, 0)).shape == (2, 0)


def test_the_question_in_both_layouts() -> None:
    assert positions(mark_question(torch.tensor([THREE, TWO]), SEP)) == [[0, 1, 2], [0, 1, 2]]


def test_the_choice_in_both_layouts() -> None:
    marks = mark_choice(torch.tensor([THREE, TWO]), SEP)
    assert positions(marks) == [[5, 6, 7, 8, 9], [4, 5, 6, 7, 8, 9]]
    assert positions(mark_choice(torch.tensor([[0, 9, SEP]]), SEP)) == [[]]


def test_the_published_masks_are_the_same() -> None:
    ids = torch.tensor([THREE, [0, SEP, SEP, 8, 8, SEP, PAD, PAD, PAD, PAD]])
    before = _compute_global_attention_mask(ids, SEP, before_sep_token=True)
    after = _compute_global_attention_mask(ids, SEP, before_sep_token=False)
    assert torch.equal(mark_question(ids, SEP), before.long())
    assert torch.equal(mark_choice(ids, SEP), after.long())


@pytest.mark.parametrize("separator", [SEP, None])
def test_a_row_without_a_separator_is_refused(separator: int | None) -> None:
    with pytest.raises(ShapeError, match=f"no separator token .id {separator}"):
        mark_question(torch.tensor([[0, 5, 5]]), separator)


def test_spans_of_a_real_encoding() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = ["The tenant shall pay the rent monthly", "No term of that kind"]
    rows = [[(0, 0), *backend.encode(text).offsets, (0, 0)] for text in texts]
    rows = [row + [(0, 0)] * (10 - len(row)) for row in rows]
    spans = [[(4, 10), (13, 20)], []]
    # tenant; shall and pay, of which the span holds a part
    assert positions(mark_spans(torch.tensor(rows), spans)) == [[2, 3, 4], []]


@pytest.mark.parametrize(
    ("offsets", "spans", "words"),
    [
        (torch.zeros(1, 4), [[]], r"shape \[1, 4\]"),
        (torch.zeros(2, 4, 2), [[]], "1 documents but offsets for 2"),
        (torch.zeros(1, 4, 2), [[(3, 3)]], "from 3 to 3"),
        (torch.zeros(1, 4, 2), [[(-1, 3)]], "from -1 to 3"),
    ],
)
def test_wrong_spans_are_named(
    offsets: Tensor, spans: list[list[tuple[int, int]]], words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        mark_spans(offsets, spans)
