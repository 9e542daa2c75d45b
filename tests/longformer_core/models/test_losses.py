import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from longformer_core.errors import ShapeError
from longformer_core.models.losses import token_logits


def draw_labels(share: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (3, 40), generator=generator)
    return labels.masked_fill(torch.rand(labels.shape, generator=generator) >= share, -100)


class Head(nn.Linear):
    """A head that remembers how many tokens it was given."""

    def forward(self, input: Tensor) -> Tensor:
        self.given = [*getattr(self, "given", []), input.shape[:-1].numel()]
        return super().forward(input)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.15, 0.05])
@pytest.mark.parametrize("learns", [True, False])
def test_the_loss_is_that_of_all_logits(share: float, learns: bool) -> None:
    labels, head = draw_labels(share), Head(8, 9).double()
    found = []
    for oracle in (True, False):
        states = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(1)).double()
        states.requires_grad_()
        head.zero_grad()
        with torch.set_grad_enabled(learns):
            if oracle:
                logits = head(states)
                loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            else:
                logits, loss = token_logits(head, states, labels)
        assert loss is not None
        if learns:
            # Logits are differentiable beside the loss.
            (loss + (logits**2).mean()).backward()
        found.append([logits, loss, states.grad, head.weight.grad, head.bias.grad])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_of_few_labels_cost_little() -> None:
    labels, head = draw_labels(0.15), Head(8, 9)
    token_logits(head, torch.randn(3, 40, 8), labels)
    assert head.given == [120, int(labels.ne(-100).sum())]
    head.given.clear()
    token_logits(head, torch.randn(3, 40, 8), draw_labels(0.9))
    with torch.no_grad():
        token_logits(head, torch.randn(3, 40, 8), labels)
    assert head.given == [120, 120]


def test_without_any_label_the_loss_is_that_of_no_token() -> None:
    labels, head = torch.full((1, 4), -100), nn.Linear(8, 9)
    _, loss = token_logits(head, torch.randn(1, 4, 8), labels)
    assert loss is not None
    assert loss.isnan()  # as published: the mean of no number


def test_labels_of_masked_tokens_are_named() -> None:
    labels, mask = torch.full((2, 4), -100), torch.ones(2, 4)
    labels[1, 2], mask[1, 2] = 7, 0
    with pytest.raises(ShapeError, match="row 1 has label 7 at position 2, which is masked"):
        token_logits(nn.Linear(8, 9), torch.randn(2, 4, 8), labels, mask)
