"""What the options do to next-token scores: bans, penalties, forced tokens, sampling filters.

Shapes: B documents, K rows of each, V vocabulary, L longest output, S longest source, W n-grams.
Source: transformers 5.23 `logits_process`, for the rules and their order.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from longformer_core.generation.config import GenerationConfig

_NO_RULE: dict[str, object] = {
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": (),
    "shortest_length": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
}


@dataclass(slots=True)
class History:
    """What the rows have read and written so far.

    Shapes: tokens [B, K, L]; lengths [B] on the CPU, tokens written so far by every row of a
    document, start token included; source_ids [B, S] and source_lengths [B], padded anyhow.
    """

    tokens: Tensor
    lengths: Tensor
    source_ids: Tensor
    source_lengths: Tensor


class ScoreRules:
    """Apply the rules of one set of options to the scores of the next token, in published order.

    Lengths stay on the CPU, where they are known without waiting for the device: a rule that
    holds at one position only costs nothing at the others.
    """

    def __init__(self, options: GenerationConfig, device: torch.device) -> None:
        def ids(tokens: tuple[int, ...]) -> Tensor:
            return torch.tensor(tokens, dtype=torch.int64, device=device)

        self._options = options
        self._eos = ids(options.eos_token_ids)
        self._forced_bos = ids(
            () if options.forced_bos_token_id is None else (options.forced_bos_token_id,)
        )
        self._forced_eos = ids(options.forced_eos_token_ids)
        self._suppressed = ids(options.suppress_tokens)
        self._begin_suppressed = ids(options.begin_suppress_tokens)
        self._bad_words = [
            torch.tensor(words, dtype=torch.int64, device=device)
            for words in _words_by_length(options)
        ]
        self._has_rules = any(getattr(options, name) != value for name, value in _NO_RULE.items())

    @property
    def needs_source(self) -> bool:
        """Return whether a rule looks at the source's tokens."""
        options = self._options
        return options.encoder_no_repeat_ngram_size > 0 or options.encoder_repetition_penalty != 1

    def __call__(self, scores: Tensor, history: History) -> Tensor:
        """Return what the rules make of the scores; the given ones are left alone.

        Shapes: scores [B, K, V] float32, logits or log-probabilities; returns the same.
        """
        if not self._has_rules:
            return scores
        scores = scores.clone()
        self._penalize_repetition(scores, history)
        self._ban_ngrams(scores, history)
        options, lengths = self._options, history.lengths
        _ban(scores, lengths < options.shortest_length, self._eos)
        if len(self._forced_bos):
            _force(scores, lengths == 1, self._forced_bos)
        if len(self._forced_eos):
            _force(scores, lengths == options.total_length - 1, self._forced_eos)
        scores.index_fill_(-1, self._suppressed, -math.inf)
        # With a forced first token, the beginning that options can steer is the second one.
        first = 1 if options.forced_bos_token_id is None else 2
        _ban(scores, lengths == first, self._begin_suppressed)
        return scores

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
        size = self._options.no_repeat_ngram_size
        if size > 0:
            _ban_completions(scores, tokens, lengths, _ngrams(tokens, size), lengths)
        size = self._options.encoder_no_repeat_ngram_size
        if size > 0:
            ngrams = _ngrams(history.source_ids[:, None], size)
            _ban_completions(scores, tokens, lengths, ngrams, history.source_lengths)
        for words in self._bad_words:
            _ban_completions(scores, tokens, lengths, words[None, None], None)


def _words_by_length(options: GenerationConfig) -> list[tuple[tuple[int, ...], ...]]:
    """Group the bad words by length, so that a group is one table. The end is never a bad word."""
    groups: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for word in dict.fromkeys(options.bad_words_ids):
        if len(word) > 1 or word[0] not in options.eos_token_ids:
            groups[len(word)].append(word)
    return [tuple(group) for group in groups.values()]


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


def _ban_completions(
    scores: Tensor, tokens: Tensor, lengths: Tensor, ngrams: Tensor, text_lengths: Tensor | None
) -> None:
    """Ban each token that would complete one of `ngrams` at the end of a row.

    Shapes: scores [B, K, V]; tokens [B, K, L] with `lengths` [B]; ngrams broadcastable to
    [B, K, W, n]; text_lengths [B]: how long the text is of which `ngrams` lists the runs.
    """
    num_ngrams, size = ngrams.shape[-2:]
    start = lengths[:, None] + torch.arange(1 - size, 0, device=tokens.device)
    last = start.clamp(min=0)[:, None].expand(-1, tokens.shape[1], -1)
    is_match = (ngrams[..., :-1] == tokens.gather(-1, last)[:, :, None]).all(-1)
    is_match &= (lengths >= size - 1)[:, None, None]
    if text_lengths is not None:
        end = torch.arange(size, size + num_ngrams, device=tokens.device)
        is_match &= (end <= text_lengths[:, None])[:, None]
    bans = scores.new_zeros(is_match.shape).masked_fill_(is_match, -math.inf)
    scores.scatter_add_(-1, ngrams[..., -1].expand(is_match.shape), bans)


def sampling_scores(scores: Tensor, options: GenerationConfig) -> Tensor:
    """Return the scores whose softmax is sampled: temperature, then top-k, then top-p.

    Shapes: scores [..., V] float32; returns the same, with -inf for what is filtered out.
    """
    if options.temperature != 1:
        scores = scores / options.temperature
    if 0 < options.top_k < scores.shape[-1]:
        smallest = scores.topk(options.top_k).values[..., -1:]
        scores = scores.masked_fill(scores < smallest, -math.inf)
    if options.top_p < 1:
        ordered, order = scores.sort()
        is_tail = ordered.softmax(-1).cumsum(-1) <= 1 - options.top_p
        is_tail[..., -1] = False
        scores = scores.masked_fill(is_tail.scatter(-1, order, is_tail), -math.inf)
    return scores
