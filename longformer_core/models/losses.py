"""The published losses of the heads.

Shape letters: B documents, C labels, S tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.errors import ShapeError

_IGNORED = -100
# Below this share of labelled tokens 1 + 3 x share products cost less than 3.
_FEW_LABELS = 2 / 3


def classification_loss(
    config: LEDConfig | LongformerConfig, logits: Tensor, labels: Tensor
) -> Tensor:
    """Return the loss of documents' logits [B, C] by the kind of problem.

    `config.problem_type` decides; when it is None, one label means regression (mean squared error),
    whole labels classes (cross entropy), others one decision per label (binary cross entropy).
    Unlike the reference this does not write the kind into the config: the next batch may differ.
    Shapes: labels [B] of values or of classes, or [B, C] of decisions.
    """
    labels = labels.to(logits.device)
    kind = config.problem_type
    if kind is None:
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        kind = "single_label_classification" if whole else "multi_label_classification"
        kind = "regression" if config.num_labels == 1 else kind
    if kind == "regression":
        return functional.mse_loss(
            logits.squeeze(-1), labels.view(logits.squeeze(-1).shape).to(logits.dtype)
        )
    if kind == "single_label_classification":
        return functional.cross_entropy(logits, labels.view(-1))
    return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def token_logits(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    labels: Tensor | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return logits and the cross entropy over labels other than -100, None without labels.

    In training with few labels the head runs once more for their tokens alone, and the loss is
    theirs. A vocabulary's logits are the largest tensor of a step, and the gradients of most of
    them would be zeros: three products of all tokens become one of all and three of the labelled.
    Shapes: states [B, S, d]; labels and mask [B, S]; returns [B, S, C] and [].
    Raises: ShapeError for another label where the mask is 0: nobody means to learn that.
    """
    logits = head(states)
    if labels is None:
        return logits, None
    refuse_masked(labels, mask)
    labels = labels.to(logits.device)
    is_labelled = labels.ne(_IGNORED)
    chosen = labels[is_labelled]
    if len(chosen) >= _FEW_LABELS * labels.numel():
        return logits, functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    learns = torch.is_grad_enabled() and logits.requires_grad
    rows = head(states[is_labelled]) if learns else logits[is_labelled]
    return logits, functional.cross_entropy(rows, chosen)


def next_token_labels(labels: Tensor) -> Tensor:
    """Return for each token of [B, S] the label after it, and -100 for the last."""
    return functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)


def refuse_masked(labels: Tensor, mask: Tensor | None) -> None:
    """Raise ShapeError for a label other than -100 where the mask is 0."""
    if mask is None or mask.shape != labels.shape:
        return
    wrong = (labels.ne(_IGNORED) & mask.to(labels.device).eq(0)).nonzero()
    if len(wrong):
        row, position = wrong[0].tolist()
        raise ShapeError(
            f"row {row} has label {int(labels[row, position])} at position {position}, which "
            f"is masked; labels of masked tokens must be {_IGNORED}"
        )


def span_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Return the cross entropy of one end of a span; positions outside the document are ignored.

    Shapes: logits [B, S]; positions [B] or [B, 1].
    """
    num_slots = logits.shape[1]
    positions = positions.view(len(logits)).to(logits.device).clamp(0, num_slots)
    return functional.cross_entropy(logits, positions, ignore_index=num_slots)
