"""Which tokens come next: greedy, sampled, or by beams.

Documents advance together but independently: each has its own length and its own end, and what a
document gets does not depend on the others. State is tensors whose first dimension is documents,
so that documents leave by indexing. A finished document must leave before the next step.
Shapes: B documents, K rows of each, V vocabulary, L longest output, S longest source, C candidates.
Source: transformers 5.23 `generate`, for what is kept, when a search ends, and every tie.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.logits import History, ScoreRules, sampling_scores

# The score of a sequence that does not exist (yet). Finite, so that it stays comparable.
_NEVER = -1.0e9


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did.

    Shapes: parents [B * K]: the row that each row continues, None when each continues itself;
    is_finished, is_failed [B]: the document needs no further step; its logits were not finite.
    """

    parents: Tensor | None
    is_finished: list[bool]
    is_failed: list[bool]


class Search(abc.ABC):
    """Hold the sequences of several documents under one set of options, and extend them.

    Shapes: tokens [B, K, L]; lengths [B] on the CPU, start token included; scores [B, K];
    source_ids [B, S] and source_lengths [B], with S = 0 when no rule looks at the source.
    """

    _state: tuple[str, ...] = ("tokens", "lengths", "scores", "source_ids", "source_lengths")

    def __init__(
        self, options: GenerationConfig, sources: Sequence[Tensor], device: torch.device
    ) -> None:
        self.options = options
        self._rules = ScoreRules(options, device)
        self._ends = torch.tensor(options.eos_token_ids, device=device)
        self.num_rows = options.rows_per_document
        shape = (len(sources), self.num_rows)
        start = options.decoder_start_token_id
        self.tokens = torch.full((*shape, options.total_length), start, device=device)
        self.lengths = torch.ones(len(sources), dtype=torch.int64)
        self.scores = torch.zeros(shape, device=device)
        texts = [ids if self._rules.needs_source else ids[:0] for ids in sources]
        self.source_ids = pad_sequence(texts, batch_first=True).to(device)
        self.source_lengths = torch.tensor([len(text) for text in texts], device=device)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return each row's newest token [B * K], and its position [B * K] on the CPU."""
        positions = (self.lengths - 1).repeat_interleave(self.num_rows)
        at = positions.to(self.tokens.device)[:, None]
        return self.tokens.flatten(0, 1).gather(1, at)[:, 0], positions

    @abc.abstractmethod
    def advance(self, logits: Tensor) -> Step:
        """Extend every row by one token. Shapes: logits [B * K, V] float32."""

    @abc.abstractmethod
    def result(self, document: int) -> tuple[list[list[int]], list[float]]:
        """Return a finished document's sequences, best first, without start token; and scores."""

    def keep(self, documents: Tensor) -> None:
        """Drop all documents but these. Shapes: documents [b] int64 on the CPU."""
        for name in self._state:
            value: Tensor = getattr(self, name)
            setattr(self, name, value.index_select(0, documents.to(value.device)))

    def _apply_rules(self, scores: Tensor) -> Tensor:
        history = History(self.tokens, self.lengths, self.source_ids, self.source_lengths)
        return self._rules(scores, history)


class RowSearch(Search):
    """Extend each row by itself: its best token, or one drawn from its distribution.

    A score is the row's summed log-probability, before any rule, over length ** length_penalty.
    Shapes: is_ended [B, K]; draws [B, K, L] in [0, 1), the random number of each position, made
    when the document enters, so that its text does not depend on its neighbours.
    """

    _state = (*Search._state, "is_ended", "draws")

    def __init__(
        self,
        options: GenerationConfig,
        sources: Sequence[Tensor],
        device: torch.device,
        seeds: Sequence[int | None],
    ) -> None:
        super().__init__(options, sources, device)
        self.is_ended = torch.zeros_like(self.scores, dtype=torch.bool)
        num_draws = options.total_length if options.do_sample else 0
        draws = [_draws(seed, num_draws, self.num_rows) for seed in seeds]
        self.draws = torch.stack(draws).to(device)

    def advance(self, logits: Tensor) -> Step:
        """Extend every row by one token; an ended row runs on unread until its siblings end."""
        logits = logits.view(*self.scores.shape, -1)
        total = logits.logsumexp(-1)
        is_failed = ~total.isfinite().all(-1)
        scores = self._apply_rules(logits)
        at = self.lengths.to(logits.device)[:, None, None].expand(-1, self.num_rows, 1)
        if self.options.do_sample:
            shares = sampling_scores(scores, self.options).softmax(-1)
            # Rules that leave no token at all make every share NaN.
            is_failed |= shares[..., 0].isnan().any(-1)
            chosen = _draw(shares, self.draws.gather(-1, at))
        else:
            chosen = scores.argmax(-1, keepdim=True)
        gained = logits.gather(-1, chosen)[..., 0] - total
        self.scores = torch.where(self.is_ended, self.scores, self.scores + gained)
        self.tokens.scatter_(-1, at, chosen)
        self.is_ended = self.is_ended | torch.isin(chosen[..., 0], self._ends)
        self.lengths = self.lengths + 1
        is_full = (self.lengths >= self.options.total_length).to(logits.device)
        return _step(None, self.is_ended.all(-1) | is_full, is_failed)

    def result(self, document: int) -> tuple[list[list[int]], list[float]]:
        """Return the document's rows, best first."""
        length = int(self.lengths[document])
        rows = self.tokens[document, :, 1:length].tolist()
        sequences = [_until_end(row, self.options.eos_token_ids) for row in rows]
        scores = [
            score / len(sequence) ** self.options.length_penalty
            for score, sequence in zip(self.scores[document].tolist(), sequences, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda row: -scores[row])
        return [sequences[row] for row in order], [scores[row] for row in order]


class BeamSearch(Search):
    """Extend the most likely rows of each document, and collect the best that ended.

    Shapes: `tokens` and `scores` are the rows still running. ended_tokens [B, K, L],
    ended_lengths, ended_scores and is_ended [B, K]: the best that ended, best first, with holes
    (`is_ended` false) until K have.
    """

    _state = (*Search._state, "ended_tokens", "ended_lengths", "ended_scores", "is_ended")

    def __init__(
        self, options: GenerationConfig, sources: Sequence[Tensor], device: torch.device
    ) -> None:
        super().__init__(options, sources, device)
        self.ended_tokens = self.tokens
        self.ended_lengths = torch.ones_like(self.scores, dtype=torch.int64)
        self.ended_scores = torch.full_like(self.scores, _NEVER)
        self.is_ended = torch.zeros_like(self.scores, dtype=torch.bool)
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
        totals = self._apply_rules(log_probs) + self.scores[..., None]
        width = max(2, 1 + len(self._ends)) * num_rows
        scores, flat = totals.flatten(1).topk(width)
        parents, newest = flat // log_probs.shape[-1], flat % log_probs.shape[-1]

        at = self.lengths.to(logits.device)[:, None]
        tokens = _pick(self.tokens, parents)
        tokens.scatter_(-1, at[..., None].expand(-1, width, 1), newest[..., None])
        is_end = torch.isin(newest, self._ends) | (at + 1 >= self.options.total_length)
        self._collect(tokens, scores, is_end)

        scores = scores + is_end * _NEVER
        best = scores.topk(num_rows).indices
        self.tokens, self.scores = _pick(tokens, best), scores.gather(1, best)
        self.lengths = self.lengths + 1
        is_finished = ~self._can_improve() | is_end.all(-1)
        if self.options.early_stopping is True:
            is_finished |= self.is_ended.all(-1)
        first_row = torch.arange(num_documents, device=logits.device)[:, None] * num_rows
        return _step((parents.gather(1, best) + first_row).flatten(), is_finished, is_failed)

    def _collect(self, tokens: Tensor, scores: Tensor, is_end: Tensor) -> None:
        """Keep the K best of what ended before and what ends with this step's token.

        Only the K most likely candidates may end; the others are there to run on.
        Shapes: tokens [B, C, L]; scores, is_end [B, C].
        """
        is_end = is_end & (torch.arange(scores.shape[1], device=scores.device) < self.num_rows)
        scores = scores / self._divisors(self.lengths)
        scores = scores + ~is_end * _NEVER

        lengths = (self.lengths + 1).to(scores.device)[:, None].expand_as(is_end)
        scores = torch.cat([self.ended_scores, scores], 1)
        best = scores.topk(self.num_rows).indices
        self.ended_scores = scores.gather(1, best)
        self.ended_tokens = _pick(torch.cat([self.ended_tokens, tokens], 1), best)
        self.ended_lengths = torch.cat([self.ended_lengths, lengths], 1).gather(1, best)
        self.is_ended = torch.cat([self.is_ended, is_end], 1).gather(1, best)

    def _can_improve(self) -> Tensor:
        """Return whether a running row may still beat the worst of what ended, [B].

        A guess unless the length penalty is 0: the best running row is scored at its present
        length, or at full length when early_stopping is "never" and longer is better.
        """
        options, lengths = self.options, self.lengths - 1
        if options.early_stopping == "never" and options.length_penalty > 0:
            lengths = torch.full_like(lengths, options.total_length - 1)
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
        tokens = self.ended_tokens[document, best].tolist()
        lengths = self.ended_lengths[document, best].tolist()
        sequences = [row[1:length] for row, length in zip(tokens, lengths, strict=True)]
        return sequences, self.ended_scores[document, best].tolist()


def start_search(
    options: GenerationConfig,
    sources: Sequence[Tensor],
    seeds: Sequence[int | None],
    device: torch.device,
) -> Search:
    """Begin to decode documents, each row holding the decoder's start token.

    sources: the documents' tokens, one int64 tensor each.
    seeds: one per document, for sampling; None draws a fresh one.
    """
    if options.num_beams > 1:
        return BeamSearch(options, sources, device)
    return RowSearch(options, sources, device, seeds)


def _step(parents: Tensor | None, is_finished: Tensor, is_failed: Tensor) -> Step:
    # The one place where the host waits for the device.
    finished, failed = torch.stack([is_finished, is_failed]).tolist()
    return Step(parents, finished, failed)


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """Gather rows of each document: [B, C, L] by [B, K] -> [B, K, L]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _draws(seed: int | None, num_draws: int, num_rows: int) -> Tensor:
    """Return the random numbers of one document, [K, L]: those of a position do not depend on L."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return torch.rand((num_draws, num_rows), generator=generator).T


def _draw(shares: Tensor, draws: Tensor) -> Tensor:
    """Return the token at each draw of the cumulated shares: [B, K, V], [B, K, 1] -> [B, K, 1].

    Numerics: cumulated in float64, so that the last of many tokens keeps its share.
    """
    cumulated = shares.double().cumsum(-1)
    at = torch.searchsorted(cumulated, draws.double() * cumulated[..., -1:], right=True)
    return at.clamp(max=shares.shape[-1] - 1)


def _until_end(tokens: list[int], end_ids: tuple[int, ...]) -> list[int]:
    """Cut a row after its first end token."""
    for count, token in enumerate(tokens, start=1):
        if token in end_ids:
            return tokens[:count]
    return tokens
