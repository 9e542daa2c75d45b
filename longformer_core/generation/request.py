"""What is asked of one document, and what becomes of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from longformer_core.errors import LongformerError
from longformer_core.generation.config import GenerationConfig
from longformer_core.scheduling.handle import Handle


@dataclass(frozen=True, slots=True)
class Request:
    """One document to decode.

    global_positions: the tokens that attend to everything; None takes the package's default.
    seed: what sampling starts from; None draws a fresh one.
    valid: a flag per token, False for one that keeps its place but that nothing attends to.

    >>> request = Request([0, 31, 7, 2], GenerationConfig(num_beams=2, max_new_tokens=5))
    >>> request.num_rows, request.num_steps
    (2, 5)
    """

    input_ids: Sequence[int]
    options: GenerationConfig
    global_positions: Sequence[int] | None = None
    seed: int | None = None
    valid: Sequence[bool] | None = None

    @property
    def num_rows(self) -> int:
        """Return how many rows the document decodes side by side."""
        return self.options.rows_per_document

    @property
    def kind(self) -> tuple[int, bool]:
        """Return what documents share that step together: how many rows, and what rows are."""
        return self.num_rows, self.options.prompt_lookup_num_tokens is not None

    @property
    def num_steps(self) -> int:
        """Return how many tokens a row has written when its last one is read off the logits."""
        return self.options.total_length - 1


@dataclass(frozen=True, slots=True)
class Generation:
    """What became of one document: its sequences, or the error that kept it from having any.

    sequences: generated ids, best first, without start token and padding; an end token is kept.
    scores: summed log-probability / length ** length_penalty, one per sequence.
    step_scores: [steps, rows, vocabulary] on the CPU, and beam_indices, the row that each token of
        each sequence was added to; both only with the option `output_scores`.
    """

    sequences: list[list[int]]
    scores: list[float]
    error: LongformerError | None = None
    step_scores: Tensor | None = None
    beam_indices: list[list[int]] | None = None


GenerationHandle = Handle[Request, Generation]
