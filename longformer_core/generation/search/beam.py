"""The most likely rows of each document, or drawn ones, and the best that ended.

Shapes: B documents, K beams of each, V vocabulary, L longest output, C candidates.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.search.base import Search, Step, common_prefix, step_of

# The score of a sequence that does not exist (yet). Finite, so that it stays comparable.
_NEVER = -1.0e9


class BeamSearch(Search):
    """Extend the most likely rows of each document, and collect the best that ended.

    When sampling, candidates are drawn instead of the most likely ones taken.
    Shapes: `tokens` and `scores` are the rows still running. ended_tokens [B, K, L],
    ended_lengths, ended_scores and is_ended [B, K]: the best that ended, best first, with holes
    (`is_ended` false) until K have. origins and ended_origins [B, K, L]: the row that each token
    was appended to; L = 0 unless scores are asked for.
    """

    _state = (
        *Search._state,
        "ended_tokens",
        "ended_lengths",
        "ended_scores",
        "is_ended",
        "origins",
        "ended_origins",
    )
    _padded = (*Search._padded, "ended_tokens", "origins", "ended_origins")

    def __init__(
        self,
        options: Sequence[GenerationConfig],
        sources: Sequence[Tensor],
        seeds: Sequence[int | None],
        device: torch.device,
    ) -> None:
        super().__init__(options, sources, seeds, device)
        self.ended_tokens = self.tokens
        self.ended_lengths = torch.ones_like(self.scores, dtype=torch.int64)
        self.ended_scores = torch.full_like(self.scores, _NEVER)
        self.is_ended = torch.zeros_like(self.scores, dtype=torch.bool)
        width = self.tokens.shape[-1] if self.options.output_scores else 0
        self.origins = torch.zeros_like(self.tokens[..., :width])
        self.ended_origins = self.origins
        # The rows start equal; only the first counts, or all would find the same candidates.
        self.scores[:, 1:] = _NEVER

    def advance(self, logits: Tensor) -> Step:
        """Extend every row by one token.

        Enough candidates are kept that K of them run on even if all others end here.
        """
        num_documents, num_rows = self.scores.shape
        log_probs = logits.log_softmax(-1).view(num_documents, num_rows, -1)
        # One NaN or +inf among the logits makes all log-probabilities of its row NaN.
        is_failed = log_probs[..., 0].isnan().any(-1)
        totals = self._process(log_probs) + self.scores[..., None]
        scores, flat = self._candidates(totals.flatten(1))
        is_failed |= scores.isnan().any(-1)
        parents, newest = flat // log_probs.shape[-1], flat % log_probs.shape[-1]

        at = self.lengths.to(logits.device)[:, None]
        tokens = _append(self.tokens, parents, at, newest)
        origins = _append(self.origins, parents, at, parents)
        is_end = self._is_end(tokens, newest) | (at + 1 >= self.longest.to(at.device)[:, None])
        self._collect(tokens, origins, scores, is_end)

        scores = scores + is_end * _NEVER
        best = scores.topk(num_rows).indices
        self.tokens, self.scores = _pick(tokens, best), scores.gather(1, best)
        self.origins = _pick(origins, best)
        self.lengths = self.lengths + 1
        is_finished = ~self._can_improve() | is_end.all(-1)
        if self.options.early_stopping is True:
            is_finished |= self.is_ended.all(-1)
        first_row = torch.arange(num_documents, device=logits.device)[:, None] * num_rows
        return step_of((parents.gather(1, best) + first_row).flatten(), is_finished, is_failed)

    def _candidates(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores and places of the most likely, or of drawn, continuations.

        Shapes: totals [B, K * V]; returns [B, C] each.
        """
        num_candidates = max(2, 1 + len(self._ends)) * self.num_rows
        if not self.options.do_sample:
            scores, places = totals.topk(num_candidates)
            return scores, places
        places = self._draw(totals.softmax(-1)[:, None], num_candidates)[:, 0]
        return totals.gather(1, places), places

    def _collect(self, tokens: Tensor, origins: Tensor, scores: Tensor, is_end: Tensor) -> None:
        """Keep the K best of what ended before and what ends with this step's token.

        Only the first K candidates may end; the others are there to run on.
        Shapes: tokens, origins [B, C, L]; scores, is_end [B, C].
        """
        is_end = is_end & (torch.arange(scores.shape[1], device=scores.device) < self.num_rows)
        scores = scores / self._divisors(self.lengths)
        scores = scores + ~is_end * _NEVER

        lengths = (self.lengths + 1).to(scores.device)[:, None].expand_as(is_end)
        scores = torch.cat([self.ended_scores, scores], 1)
        best = scores.topk(self.num_rows).indices
        self.ended_scores = scores.gather(1, best)
        self.ended_tokens = _pick(torch.cat([self.ended_tokens, tokens], 1), best)
        self.ended_origins = _pick(torch.cat([self.ended_origins, origins], 1), best)
        self.ended_lengths = torch.cat([self.ended_lengths, lengths], 1).gather(1, best)
        self.is_ended = torch.cat([self.is_ended, is_end], 1).gather(1, best)

    def _can_improve(self) -> Tensor:
        """Return whether a running row may still beat the worst of what ended, [B].

        A guess unless the length penalty is 0: the best running row is scored at its present
        length, or at full length when early_stopping is "never" and longer is better.
        """
        options, lengths = self.options, self.lengths - 1
        if options.early_stopping == "never" and options.length_penalty > 0:
            lengths = self.longest - 1
        possible = self.scores[:, :1] / self._divisors(lengths)
        worst = self.ended_scores.amin(1, keepdim=True)
        worst = torch.where(self.is_ended, worst, _NEVER)
        return (possible > worst).any(1)

    def _divisors(self, num_generated: Tensor) -> Tensor:
        """Return num_generated ** length_penalty in float32: [B] -> [B, 1]."""
        divisors = num_generated.double() ** self.options.length_penalty
        return divisors.to(self.scores)[:, None]

    def result(self, document: int) -> tuple[list[list[int]], list[float]]:
        """Return the document's best sequences that ended."""
        best = slice(self.options.num_return_sequences)
        scores = self.ended_scores[document, best].tolist()
        return self._ended(self.ended_tokens, document)[best], scores

    def beam_indices_of(self, document: int) -> list[list[int]]:
        """Return, for each sequence of the result, the row that each of its tokens was added to.

        Raises: ConfigError when the options do not ask for scores.
        """
        self._check_keeps_scores()
        return self._ended(self.ended_origins, document)[: self.options.num_return_sequences]

    def agreed(self, document: int) -> list[int]:
        """Return what all rows that run and all sequences that ended begin with."""
        running = self.tokens[document, :, 1 : int(self.lengths[document])].tolist()
        ended = self._ended(self.ended_tokens, document)
        is_ended = self.is_ended[document].tolist()
        return common_prefix(running + list(itertools.compress(ended, is_ended)))

    def _ended(self, values: Tensor, document: int) -> list[list[int]]:
        """Return what ended, tokens or origins, best first and without the start token."""
        rows, lengths = values[document].tolist(), self.ended_lengths[document].tolist()
        return [row[1:length] for row, length in zip(rows, lengths, strict=True)]


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """Gather rows of each document: [B, C, L] by [B, K] -> [B, K, L]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _append(rows: Tensor, parents: Tensor, at: Tensor, newest: Tensor) -> Tensor:
    """Continue the parents' rows: [B, K, L], parents [B, C], at [B, 1], newest [B, C] -> [B, C, L].

    Rows without width are records that nobody asked for.
    """
    rows = _pick(rows, parents)
    if rows.shape[-1] > 0:
        rows.scatter_(-1, at[..., None].expand(*parents.shape, 1), newest[..., None])
    return rows
