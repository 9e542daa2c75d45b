"""Each row by itself: its best token, or one drawn from its distribution.

Shapes: B documents, K rows of each, V vocabulary, L longest output.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.search.base import Search, Step, common_prefix, step_of


class RowSearch(Search):
    """Extend each row by itself: its best token, or one drawn from its distribution.

    A score is the row's summed log-probability, before the processors, over
    length ** length_penalty.
    Shapes: is_ended [B, K]; num_written [B, K], tokens up to a row's end, start token left out.
    """

    _state = (*Search._state, "is_ended", "num_written")

    def __init__(
        self,
        options: Sequence[GenerationConfig],
        sources: Sequence[Tensor],
        seeds: Sequence[int | None],
        device: torch.device,
    ) -> None:
        super().__init__(options, sources, seeds, device)
        self.is_ended = torch.zeros_like(self.scores, dtype=torch.bool)
        self.num_written = torch.zeros_like(self.scores, dtype=torch.int64)
        ends, own_pad = self.options.eos_token_ids, self.options.pad_token_id
        self._pad = ends[0] if own_pad is None else own_pad

    def advance(self, logits: Tensor) -> Step:
        """Extend every row by one token; an ended row is padded until its siblings end."""
        logits = logits.view(*self.scores.shape, -1)
        total = logits.logsumexp(-1)
        is_failed = ~total.isfinite()
        scores = self._process(logits)
        if self.options.do_sample:
            shares = scores.softmax(-1)
            # Rules that leave no token at all make every share NaN.
            is_failed |= shares[..., 0].isnan()
            newest = self._draw(shares, 1)[..., 0]
        else:
            newest = scores.argmax(-1)
        newest = newest.masked_fill(self.is_ended, self._pad)
        at = self.lengths.to(logits.device)[:, None, None].expand(-1, self.num_rows, 1)
        self.tokens.scatter_(-1, at, newest[..., None])
        is_running = ~self.is_ended
        gained = logits.gather(-1, newest[..., None])[..., 0] - total
        self.scores = torch.where(is_running, self.scores + gained, self.scores)
        self.num_written = self.num_written + is_running
        self.is_ended = self.is_ended | self._is_end(self.tokens, newest)
        self.lengths = self.lengths + 1
        is_full = (self.lengths >= self.longest).to(logits.device)
        return step_of(None, self.is_ended.all(-1) | is_full, (is_failed & is_running).any(-1))

    def result(self, document: int) -> tuple[list[list[int]], list[float]]:
        """Return the document's rows, best first."""
        rows, scores = self._rows(document), self._final_scores(document)
        order = self._order(document)
        return [rows[row] for row in order], [scores[row] for row in order]

    def agreed(self, document: int) -> list[int]:
        """Return what all rows of the document begin with; with one row, all it has written."""
        return common_prefix(self._rows(document))

    def scores_of(self, document: int) -> Tensor:
        """Return the scores of the steps, the rows in the order of the result."""
        return super().scores_of(document)[:, self._order(document)]

    def _rows(self, document: int) -> list[list[int]]:
        counts = self.num_written[document].tolist()
        rows = self.tokens[document].tolist()
        return [row[1 : 1 + count] for row, count in zip(rows, counts, strict=True)]

    def _final_scores(self, document: int) -> list[float]:
        sums, counts = self.scores[document].tolist(), self.num_written[document].tolist()
        penalty = self.options.length_penalty
        return [total / count**penalty for total, count in zip(sums, counts, strict=True)]

    def _order(self, document: int) -> list[int]:
        scores = self._final_scores(document)
        return sorted(range(len(scores)), key=lambda row: -scores[row])
