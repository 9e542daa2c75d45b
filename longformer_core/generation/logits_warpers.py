"""Which tokens may be drawn: the filters between a model's scores and the draw.

Shapes: scores [..., V] float32, V vocabulary; a filter returns which are dropped, [..., V].
Source: transformers 5.23 `logits_process`, for the filters, their order and their ties.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from longformer_core.generation.config import GenerationConfig


def sampling_scores(scores: Tensor, options: GenerationConfig) -> Tensor:
    """Return the scores whose softmax is sampled, -inf for what is filtered out.

    Each filter sees what the ones before it have left, and leaves at least one token; for beams,
    one more than there are ids that end a text, or a text could not go on.
    """
    num_kept = 1 + len(options.eos_token_ids) if options.num_beams > 1 else 1
    num_kept = min(num_kept, scores.shape[-1])
    if options.temperature != 1:
        scores = scores / options.temperature
    for is_dropped in _filters(options):
        scores = scores.masked_fill(is_dropped(scores, num_kept), -math.inf)
    return scores


def _filters(options: GenerationConfig) -> Iterator[Callable[[Tensor, int], Tensor]]:
    """Yield the filters that are on, in published order."""
    if options.top_k > 0:
        yield partial(_beyond_top_k, options.top_k)
    if options.top_p < 1:
        yield partial(_beyond_top_p, options.top_p)
    if options.min_p is not None:
        yield partial(_below_share_of_best, options.min_p)
    if options.typical_p < 1:
        yield partial(_beyond_typical, options.typical_p)
    if 0 < options.epsilon_cutoff < 1:
        yield partial(_below_share, options.epsilon_cutoff)
    if 0 < options.eta_cutoff < 1:
        yield partial(_below_eta, options.eta_cutoff)


def _beyond_top_k(top_k: int, scores: Tensor, num_kept: int) -> Tensor:
    return scores < _score_at_rank(scores, min(max(top_k, num_kept), scores.shape[-1]))


def _beyond_top_p(top_p: float, scores: Tensor, num_kept: int) -> Tensor:
    ordered, order = scores.sort()
    is_tail = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    is_tail[..., -num_kept:] = False
    return is_tail.scatter(-1, order, is_tail)


def _below_share_of_best(min_p: float, scores: Tensor, num_kept: int) -> Tensor:
    shares = scores.softmax(-1)
    is_below = shares < min_p * shares.amax(-1, keepdim=True)
    return is_below.scatter(-1, shares.topk(num_kept).indices, False)


def _beyond_typical(mass: float, scores: Tensor, num_kept: int) -> Tensor:
    """Drop what is much more or much less surprising than a token is on average."""
    log_shares = scores.log_softmax(-1)
    entropy = -(log_shares * log_shares.exp()).nansum(-1, keepdim=True)
    distances, order = (-log_shares - entropy).abs().sort()
    cumulated = scores.gather(-1, order).softmax(-1).cumsum(-1)
    last = (cumulated < mass).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    is_far = distances > distances.gather(-1, last)
    is_far[..., :num_kept] = False
    return is_far.scatter(-1, order, is_far)


def _below_share(share: float, scores: Tensor, num_kept: int) -> Tensor:
    return (scores.softmax(-1) < share) & (scores < _score_at_rank(scores, num_kept))


def _below_eta(share: float, scores: Tensor, num_kept: int) -> Tensor:
    """Drop below a share that falls with the entropy of the distribution."""
    log_shares = scores - scores.logsumexp(-1, keepdim=True)
    finite = log_shares.clamp(min=torch.finfo(scores.dtype).min)
    entropy = -(finite * log_shares.softmax(-1)).sum(-1, keepdim=True)
    limit = (math.sqrt(share) * (-entropy).exp()).clamp(max=share)
    return (scores.softmax(-1) < limit) & (scores < _score_at_rank(scores, num_kept))


def _score_at_rank(scores: Tensor, rank: int) -> Tensor:
    """Return the score of the rank-th best token, counted from 1: [..., V] -> [..., 1]."""
    return scores.topk(rank).values[..., -1:]
