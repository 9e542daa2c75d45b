"""What is asked of one document, and what is found.

Shape letters: N tokens of the document, d hidden size, C labels, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from longformer_core.errors import LongformerError
from longformer_core.scheduling.handle import Handle

Want = Literal["states", "first", "mean", "pooler"]


@dataclass(frozen=True, slots=True)
class EncodingRequest:
    """One document to read; in multiple choice one of its choices.

    A model with a head always gives the head's answer; the rest is asked for.
    global_positions: the tokens that attend to everything; None does what the model's forward does
        without a global mask: the first token to classify, the question to answer it, a choice's
        own text to choose, and none otherwise.
    valid: a flag per token, False for one that keeps its place but that nothing attends to.
    token_type_ids: of a Longformer that has several.
    want: states of the encoder that come back beside the head's answer, see `Encoding`.
    logit_positions: where a masked language model makes logits; nowhere else are they made.
    mean_positions: the tokens of "mean"; None takes the valid ones without `<s>`, `</s>` and
        padding, or all valid ones when that leaves none.
    spans: (start, end) in tokens, end excluded, of which the mean states come back.

    >>> request = EncodingRequest([0, 31, 7, 2], want=["mean"], spans=[(1, 3)])
    >>> encoding = EncodingEngine(encoder).submit(request).result()
    >>> encoding.mean.shape, encoding.span_means.shape
    (torch.Size([32]), torch.Size([1, 32]))
    """

    input_ids: Sequence[int]
    global_positions: Sequence[int] | None = None
    valid: Sequence[bool] | None = None
    token_type_ids: Sequence[int] | None = None
    want: Sequence[Want] = ()
    logit_positions: Sequence[int] = ()
    mean_positions: Sequence[int] | None = None
    spans: Sequence[tuple[int, int]] = ()

    @property
    def num_rows(self) -> int:
        """Return 1: the packed tokens are all that counts."""
        return 1

    @property
    def kind(self) -> None:
        """Return None: any documents are read together."""
        return None


@dataclass(frozen=True, slots=True)
class Encoding:
    """What was found of one document, or the error that kept it from being read.

    All tensors are float32 on the CPU, and None when nobody asked or the model has no such head.
    logits: [C] of a document, [1] the score of a choice, [N, C] of tokens to be classified, or
        [positions, V] of a masked language model, in the order of `logit_positions`.
    start_logits, end_logits: [N], that an answer starts or ends at a token.
    states: [N, d]; first: [d], the first token's; mean: [d]; pooler: [d].
    span_means: [spans, d].
    """

    logits: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    states: Tensor | None = None
    first: Tensor | None = None
    mean: Tensor | None = None
    pooler: Tensor | None = None
    span_means: Tensor | None = None
    error: LongformerError | None = None


EncodingHandle = Handle[EncodingRequest, Encoding]
