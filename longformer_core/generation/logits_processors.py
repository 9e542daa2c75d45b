"""What the options do to next-token scores: biases, penalties, bans, forced tokens.

Shapes: B documents, K rows of each, V vocabulary, L longest output, S longest source, W n-grams.
Source: transformers 5.23 `logits_process`, for the processors and their order.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from longformer_core.errors import ConfigError
from longformer_core.generation.config import GenerationConfig, TokenIds
from longformer_core.generation.logits_warpers import sampling_scores

_NEUTRAL: dict[str, object] = {
    "sequence_bias": (),
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": (),
    "prefix_allowed_tokens_fn": None,
    "forced_bos_token_id": None,
    "forced_eos_token_ids": (),
    "exponential_decay_length_penalty": None,
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
}


@dataclass(slots=True)
class History:
    """What the rows have read and written so far.

    Shapes: tokens [B, K, L]; lengths [B] on the CPU, tokens written so far by every row of a
    document, start token included; source_ids [B, S] and source_lengths [B], padded anyhow;
    shortest, longest [B] on the CPU, or a number for all: the lengths, start token included,
    before which no row may end and at which every row does.
    """

    tokens: Tensor
    lengths: Tensor
    source_ids: Tensor
    source_lengths: Tensor
    shortest: Tensor | int
    longest: Tensor | int


class LogitsProcessors:
    """Apply the processors of one set of options to the next scores, in published order.

    Lengths stay on the CPU, where they are known without waiting for the device: a processor
    that acts at one position only costs nothing at the others.
    """

    def __init__(self, options: GenerationConfig, device: torch.device) -> None:
        def ids(tokens: Iterable[object]) -> Tensor:
            return torch.tensor(tuple(tokens), dtype=torch.int64, device=device)

        self._options = options
        self._eos = ids(options.eos_token_ids)
        self._forced_bos = ids(
            () if options.forced_bos_token_id is None else (options.forced_bos_token_id,)
        )
        self._forced_eos = ids(options.forced_eos_token_ids)
        self._suppressed = ids(options.suppress_tokens)
        self._begin_suppressed = ids(options.begin_suppress_tokens)
        # The end is never a bad word.
        ends = [(token,) for token in options.eos_token_ids]
        bad_words = [word for word in dict.fromkeys(options.bad_words_ids) if word not in ends]
        self._bad_words = [ids(words) for words in _by_length(bad_words)]
        biases = dict(options.sequence_bias)
        self._biased = [
            (ids(group), torch.tensor([biases[sequence] for sequence in group], device=device))
            for group in _by_length(biases)
        ]
        self._changes_scores = any(
            getattr(options, name) != value for name, value in _NEUTRAL.items()
        )

    @property
    def needs_source(self) -> bool:
        """Return whether a processor looks at the source's tokens."""
        options = self._options
        return options.encoder_no_repeat_ngram_size > 0 or options.encoder_repetition_penalty != 1

    def __call__(self, scores: Tensor, history: History) -> Tensor:
        """Return what the processors make of the scores; the given ones are left alone.

        Shapes: scores [B, K, V] float32, logits or log-probabilities; returns the same.
        """
        if self._changes_scores or bool((history.lengths < history.shortest).any()):
            scores = self._apply(scores.clone(), history)
        if self._options.do_sample:
            scores = sampling_scores(scores, self._options)
        if self._options.renormalize_logits:
            scores = scores.log_softmax(-1)
        return scores

    def _apply(self, scores: Tensor, history: History) -> Tensor:
        self._add_biases(scores, history)
        self._penalize_repetition(scores, history)
        self._ban_ngrams(scores, history)
        options, lengths = self._options, history.lengths
        _ban(scores, lengths < history.shortest, self._eos)
        if options.prefix_allowed_tokens_fn is not None:
            scores = self._allow(scores, history)
        if len(self._forced_bos):
            _force(scores, lengths == 1, self._forced_bos)
        if len(self._forced_eos):
            _force(scores, lengths == history.longest - 1, self._forced_eos)
        self._hasten_end(scores, lengths)
        scores.index_fill_(-1, self._suppressed, -math.inf)
        # With a forced first token, the beginning that options can steer is the second one.
        first = 1 if options.forced_bos_token_id is None else 2
        _ban(scores, lengths == first, self._begin_suppressed)
        return scores

    def _add_biases(self, scores: Tensor, history: History) -> None:
        if self._biased:
            # Summed before they are added, because published sums are rounded so.
            total = torch.zeros_like(scores)
            lengths = history.lengths.to(scores.device)
            for sequences, biases in self._biased:
                ngrams = sequences[None, None]
                _add_at_completions(total, history.tokens, lengths, ngrams, None, biases)
            scores += total

    def _penalize_repetition(self, scores: Tensor, history: History) -> None:
        options = self._options
        if options.encoder_repetition_penalty != 1:
            read = _repeat_first(history.source_ids, history.source_lengths)
            read = read[:, None].expand(-1, scores.shape[1], -1)
            _penalize(scores, read, 1 / options.encoder_repetition_penalty)
        if options.repetition_penalty != 1:
            lengths = history.lengths.to(scores.device)
            written = _repeat_first(history.tokens, lengths[:, None])
            _penalize(scores, written, options.repetition_penalty)

    def _ban_ngrams(self, scores: Tensor, history: History) -> None:
        tokens, lengths = history.tokens, history.lengths.to(scores.device)
        banned = scores.new_tensor(-math.inf)
        size = self._options.no_repeat_ngram_size
        if size > 0:
            ngrams = _ngrams(tokens, size)
            _add_at_completions(scores, tokens, lengths, ngrams, lengths, banned)
        size = self._options.encoder_no_repeat_ngram_size
        if size > 0:
            ngrams = _ngrams(history.source_ids[:, None], size)
            _add_at_completions(scores, tokens, lengths, ngrams, history.source_lengths, banned)
        for words in self._bad_words:
            _add_at_completions(scores, tokens, lengths, words[None, None], None, banned)

    def _allow(self, scores: Tensor, history: History) -> Tensor:
        """Ban what `prefix_allowed_tokens_fn` does not allow; it is asked on the CPU, by row.

        Where that leaves a document nothing at all, the other processors are set aside.
        """
        allowed_tokens = self._options.prefix_allowed_tokens_fn
        assert allowed_tokens is not None
        mask = torch.full(scores.shape, -math.inf)
        tokens = history.tokens.cpu()
        for document, length in enumerate(history.lengths.tolist()):
            for row, written in enumerate(tokens[document, :, :length]):
                allowed = list(allowed_tokens(0, written))
                if not allowed:
                    raise ConfigError(
                        f"prefix_allowed_tokens_fn allows no token after {written.tolist()}; it "
                        "must return at least one id"
                    )
                mask[document, row, allowed] = 0.0
        mask = mask.to(scores.device)
        scores = scores + mask
        is_stuck = scores.amax(-1, keepdim=True).isneginf()
        if self._options.num_beams > 1:
            is_stuck = is_stuck.all(1, keepdim=True)
        return torch.where(is_stuck, mask, scores)

    def _hasten_end(self, scores: Tensor, lengths: Tensor) -> None:
        """Raise the scores of the ends by a factor that grows with every token after the start."""
        if self._options.exponential_decay_length_penalty is None:
            return
        start, factor = self._options.exponential_decay_length_penalty
        growth = factor ** (lengths - 1 - start).clamp(min=0).double() - 1
        ends = scores[..., self._eos]
        extra = ends.abs() * growth.to(scores)[:, None, None]
        scores[..., self._eos] = ends + extra.masked_fill(~ends.isfinite(), 0.0)


def _by_length(sequences: Iterable[TokenIds]) -> list[list[TokenIds]]:
    """Group sequences by length, single tokens first, so that a group is one table."""
    groups: dict[int, list[TokenIds]] = defaultdict(list)
    for sequence in sequences:
        groups[len(sequence)].append(sequence)
    return sorted(groups.values(), key=lambda group: len(group[0]) > 1)


def _rows_where(condition: Tensor, device: torch.device) -> Tensor:
    return condition.nonzero()[:, 0].to(device)


def _ban(scores: Tensor, condition: Tensor, ids: Tensor) -> None:
    """Ban `ids` in the documents where `condition` [B] holds."""
    if len(ids) and condition.any():
        rows = _rows_where(condition, scores.device)
        scores[rows[:, None], :, ids[None, :]] = -math.inf


def _force(scores: Tensor, condition: Tensor, ids: Tensor) -> None:
    """Leave nothing but `ids` in the documents where `condition` [B] holds."""
    if condition.any():
        rows = _rows_where(condition, scores.device)
        scores[rows] = -math.inf
        scores[rows[:, None], :, ids[None, :]] = 0.0


def _repeat_first(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Overwrite what lies beyond each row's length by the row's first token.

    Shapes: tokens [..., L]; lengths [...] or what broadcasts to it.
    """
    is_beyond = torch.arange(tokens.shape[-1], device=tokens.device) >= lengths[..., None]
    return torch.where(is_beyond, tokens[..., :1], tokens)


def _penalize(scores: Tensor, tokens: Tensor, penalty: float) -> None:
    """Lower the scores of `tokens` [B, K, L] by a factor; each token once, however often it is."""
    seen = scores.gather(-1, tokens)
    scores.scatter_(-1, tokens, torch.where(seen < 0, seen * penalty, seen / penalty))


def _ngrams(texts: Tensor, size: int) -> Tensor:
    """Return every run of `size` tokens: [..., L] -> [..., W, size], W = 0 if L is too short."""
    if texts.shape[-1] < size:
        return texts.new_empty((*texts.shape[:-1], 0, size))
    return texts.unfold(-1, size, 1)


def _add_at_completions(
    scores: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    ngrams: Tensor,
    text_lengths: Tensor | None,
    amounts: Tensor,
) -> None:
    """Add to the score of each token that would complete one of `ngrams` at the end of a row.

    Shapes: scores [B, K, V]; tokens [B, K, L] with `lengths` [B]; ngrams broadcastable to
    [B, K, W, n]; text_lengths [B]: how long the text is of which `ngrams` lists the runs;
    amounts [W] or one for all.
    """
    num_ngrams, size = ngrams.shape[-2:]
    start = lengths[:, None] + torch.arange(1 - size, 0, device=tokens.device)
    last = start.clamp(min=0)[:, None].expand(-1, tokens.shape[1], -1)
    is_match = (ngrams[..., :-1] == tokens.gather(-1, last)[:, :, None]).all(-1)
    is_match &= (lengths >= size - 1)[:, None, None]
    if text_lengths is not None:
        end = torch.arange(size, size + num_ngrams, device=tokens.device)
        is_match &= (end <= text_lengths[:, None])[:, None]
    amounts = torch.where(is_match, amounts, 0.0)
    scores.scatter_add_(-1, ngrams[..., -1].expand(is_match.shape), amounts)
