"""What is asked of one document, and what becomes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    num_rows: how many rows the document decodes side by side.
    kind: what documents share that step together: how many rows, and what rows are.
    num_steps: how many tokens a row has written when its last one is read off the logits.

    >>> request = Request([0, 31, 7, 2], GenerationConfig(num_beams=2, max_new_tokens=5))
    >>> request.num_rows, request.num_steps
    (2, 5)
    """

    input_ids: Sequence[int]
    options: GenerationConfig
    global_positions: Sequence[int] | None = None
    seed: int | None = None
    valid: Sequence[bool] | None = None

    num_rows: int = field(init=False, repr=False, compare=False)
    kind: tuple[int, bool] = field(init=False, repr=False, compare=False)
    num_steps: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Count once what is looked at whenever documents are admitted."""
        options = self.options
        is_speculative = options.prompt_lookup_num_tokens is not None
        object.__setattr__(self, "num_rows", options.rows_per_document)
        object.__setattr__(self, "kind", (options.rows_per_document, is_speculative))
        object.__setattr__(self, "num_steps", options.total_length - 1)


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
