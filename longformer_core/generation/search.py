"""Which tokens come next: greedy, sampled, or by beams.

Documents advance together but independently: each has its own length, its own end and its own
randomness, and what a document gets does not depend on the others. State is tensors whose first
dimension is documents, and lists with an item for each, so that documents leave by indexing and
join by concatenation. A finished document must leave before the next step.
Shapes: B documents, K rows of each, V vocabulary, L longest output, S longest source, C candidates.
Source: transformers 5.23 `generate`, for what is kept, when a search ends, and every tie.
"""

import abc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from longformer_core.errors import ConfigError
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.logits import History, ScoreRules

# The score of a sequence that does not exist (yet). Finite, so that it stays comparable.
_NEVER = -1.0e9

_Item = TypeVar("_Item")


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

    generators: what each document draws from, so that its text does not depend on its neighbours.
    step_scores: each document's scores of every step, [K, V] on the CPU, if they are asked for.
    Shapes: tokens [B, K, L]; lengths [B] on the CPU, start token included; scores [B, K];
    source_ids [B, S] and source_lengths [B], with S = 0 when no rule looks at the source.
    """

    _state: tuple[str, ...] = ("tokens", "lengths", "scores", "source_ids", "source_lengths")
    _lists = ("generators", "step_scores")

    def __init__(
        self,
        options: GenerationConfig,
        sources: Sequence[Tensor],
        seeds: Sequence[int | None],
        device: torch.device,
    ) -> None:
        self.options = options
        self._rules = ScoreRules(options, device)
        self._ends = torch.tensor(options.eos_token_ids, device=device)
        self.num_rows = options.rows_per_document
        shape = (len(sources), self._num_sequences)
        start = options.decoder_start_token_id
        self.tokens = torch.full((*shape, options.total_length), start, device=device)
        self.lengths = torch.ones(len(sources), dtype=torch.int64)
        self.scores = torch.zeros(shape, device=device)
        texts = [ids if self._needs_source else ids[:0] for ids in sources]
        self.source_ids = pad_sequence(texts, batch_first=True).to(device)
        self.source_lengths = torch.tensor([len(text) for text in texts], device=device)
        self.generators = [_generator(seed, device) for seed in seeds]
        self.step_scores: list[list[Tensor]] = [[] for _ in sources]

    @property
    def _num_sequences(self) -> int:
        return self.num_rows

    @property
    def _needs_source(self) -> bool:
        return self._rules.needs_source

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return each row's newest token [B * K], and its position [B * K] on the CPU."""
        positions = (self.lengths - 1).repeat_interleave(self._num_sequences)
        at = positions.to(self.tokens.device)[:, None]
        return self.tokens.flatten(0, 1).gather(1, at)[:, 0], positions

    @abc.abstractmethod
    def advance(self, logits: Tensor) -> Step:
        """Extend every row by one token. Shapes: logits [B * K, V] float32."""

    @abc.abstractmethod
    def result(self, document: int) -> tuple[list[list[int]], list[float]]:
        """Return a finished document's sequences, best first, without start token; and scores."""

    @abc.abstractmethod
    def agreed(self, document: int) -> list[int]:
        """Return the tokens that the document's best sequence will begin with, as far as is known.

        What was agreed once stays: it is the common prefix of all that can still become the best.
        """

    def scores_of(self, document: int) -> Tensor:
        """Return the scores of a document's steps, after the rules: [steps, K, V] on the CPU.

        Raises: ConfigError when the options do not ask for scores.
        """
        self._check_keeps_scores()
        return torch.stack(self.step_scores[document])

    def keep(self, documents: Tensor) -> None:
        """Drop all documents but these. Shapes: documents [b] int64."""
        for name in self._state:
            value: Tensor = getattr(self, name)
            setattr(self, name, value.index_select(0, documents.to(value.device)))
        for name in self._lists:
            items = getattr(self, name)
            setattr(self, name, [items[document] for document in documents.tolist()])

    def extend(self, other: "Search") -> None:
        """Append another search's documents, which may be at other lengths than these."""
        assert type(self) is type(other)
        assert self.options == other.options
        width = max(self.source_ids.shape[1], other.source_ids.shape[1])
        for search in (self, other):
            search.source_ids = pad(search.source_ids, (0, width - search.source_ids.shape[1]))
        for name in self._state:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        for name in self._lists:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _process(self, scores: Tensor) -> Tensor:
        """Return what the options make of the next token's scores [B, K, V]; record it if asked."""
        history = History(self.tokens, self.lengths, self.source_ids, self.source_lengths)
        scores = self._rules(scores, history)
        if self.options.output_scores:
            for steps, step in zip(self.step_scores, scores.cpu(), strict=True):
                # A copy: a view would keep the scores of all documents.
                steps.append(step.clone())
        return scores

    def _draw(self, shares: Tensor, num_draws: int) -> Tensor:
        """Draw from each row without replacement: shares [B, R, N] -> [B, R, num_draws].

        This is what torch.multinomial does, draw by draw, but without its wait for the device.
        """
        noise = torch.empty_like(shares)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return (shares / noise).topk(num_draws).indices

    def _check_keeps_scores(self) -> None:
        if not self.options.output_scores:
            raise ConfigError("output_scores is off, so no scores were kept; set it to true")

    def _is_end(self, tokens: Tensor, newest: Tensor) -> Tensor:
        """Return which rows end with their newest token.

        Shapes: tokens [B, C, L]; newest [B, C], the token at position `lengths`; returns [B, C].
        """
        is_end = torch.isin(newest, self._ends)
        if self.options.stop_strings:
            lengths = self.lengths.tolist()
            hits = [
                [_ends_in_stop_string(row[1 : length + 1], self.options) for row in rows]
                for rows, length in zip(tokens.tolist(), lengths, strict=True)
            ]
            is_end = is_end | torch.tensor(hits, device=is_end.device)
        return is_end


class RowSearch(Search):
    """Extend each row by itself: its best token, or one drawn from its distribution.

    A score is the row's summed log-probability, before any rule, over length ** length_penalty.
    Shapes: is_ended [B, K]; num_written [B, K], tokens up to a row's end, start token left out.
    """

    _state = (*Search._state, "is_ended", "num_written")

    def __init__(
        self,
        options: GenerationConfig,
        sources: Sequence[Tensor],
        seeds: Sequence[int | None],
        device: torch.device,
    ) -> None:
        super().__init__(options, sources, seeds, device)
        self.is_ended = torch.zeros_like(self.scores, dtype=torch.bool)
        self.num_written = torch.zeros_like(self.scores, dtype=torch.int64)
        ends = options.eos_token_ids
        self._pad = ends[0] if options.pad_token_id is None else options.pad_token_id

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
        is_full = (self.lengths >= self.options.total_length).to(logits.device)
        return _step(None, self.is_ended.all(-1) | is_full, (is_failed & is_running).any(-1))

    def result(self, document: int) -> tuple[list[list[int]], list[float]]:
        """Return the document's rows, best first."""
        rows, scores = self._rows(document), self._final_scores(document)
        order = self._order(document)
        return [rows[row] for row in order], [scores[row] for row in order]

    def agreed(self, document: int) -> list[int]:
        """Return what all rows of the document begin with; with one row, all it has written."""
        return _common_prefix(self._rows(document))

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

    def __init__(
        self,
        options: GenerationConfig,
        sources: Sequence[Tensor],
        seeds: Sequence[int | None],
        device: torch.device,
    ) -> None:
        super().__init__(options, sources, seeds, device)
        self.ended_tokens = self.tokens
        self.ended_lengths = torch.ones_like(self.scores, dtype=torch.int64)
        self.ended_scores = torch.full_like(self.scores, _NEVER)
        self.is_ended = torch.zeros_like(self.scores, dtype=torch.bool)
        width = options.total_length if options.output_scores else 0
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
        is_end = self._is_end(tokens, newest) | (at + 1 >= self.options.total_length)
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
        return _step((parents.gather(1, best) + first_row).flatten(), is_finished, is_failed)

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
        return _common_prefix(running + list(itertools.compress(ended, is_ended)))

    def _ended(self, values: Tensor, document: int) -> list[list[int]]:
        """Return what ended, tokens or origins, best first and without the start token."""
        rows, lengths = values[document].tolist(), self.ended_lengths[document].tolist()
        return [row[1:length] for row, length in zip(rows, lengths, strict=True)]


class LookupSearch(RowSearch):
    """Guess the next tokens from the source, and keep as many as greedy decoding would have taken.

    What a document has written last is looked for in its source, and what follows it there is
    guessed to follow here. The rows of a step are the newest token and the guesses after it, so
    that one step gives the true next token after each of them: the same text in fewer steps.
    Shapes: guesses [B, N], N of them; K = 1 sequence of each document.
    Source: prompt lookup decoding, as in transformers 5.23.
    """

    _state = (*RowSearch._state, "guesses")

    def __init__(
        self,
        options: GenerationConfig,
        sources: Sequence[Tensor],
        seeds: Sequence[int | None],
        device: torch.device,
    ) -> None:
        super().__init__(options, sources, seeds, device)
        self.guesses = self._guess()

    @property
    def _num_sequences(self) -> int:
        return 1

    @property
    def _needs_source(self) -> bool:
        return True

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return the newest token and the guesses [B * (N + 1)], and their positions on the CPU.

        Guesses beyond the longest output get the last position; none of them is kept.
        """
        newest, positions = super().inputs()
        tokens = torch.cat([newest[:, None], self.guesses], 1)
        ahead = torch.arange(self.num_rows)
        positions = (self.lengths - 1)[:, None] + ahead
        return tokens.flatten(), positions.clamp(max=self.options.total_length - 2).flatten()

    def advance(self, logits: Tensor) -> Step:
        """Extend every document by one token, and one more for each guess that was right."""
        num_documents = len(self.guesses)
        logits = logits.view(num_documents, self.num_rows, -1)
        total = logits.logsumexp(-1)
        scores = self._after_each(logits)
        best = scores.argmax(-1)
        is_right = (best[:, :-1] == self.guesses).cumprod(-1).bool()
        kept, is_finished = self._keep_right(best, is_right)
        rows = torch.arange(self.num_rows, device=logits.device) < kept[:, None]
        gained = logits.gather(-1, best[..., None])[..., 0] - total
        self.scores = self.scores + (gained * rows).sum(-1, keepdim=True)
        is_failed = (~total.isfinite() & rows).any(-1)
        self._record(scores, kept)
        self.guesses = self._guess()
        # Every row goes on from the last one that was right.
        first_row = torch.arange(num_documents, device=logits.device) * self.num_rows
        parents = (first_row + kept - 1).repeat_interleave(self.num_rows)
        return _step(parents, is_finished, is_failed)

    def _after_each(self, logits: Tensor) -> Tensor:
        """Return the scores after the rules [B, N + 1, V], each row with the guesses before it."""
        places = self.lengths[:, None] + torch.arange(self.guesses.shape[1])
        at = places.clamp(max=self.tokens.shape[-1] - 1).to(logits.device)
        guessed = self.tokens.clone()
        guessed[:, 0].scatter_(-1, at, self.guesses)
        lengths = (self.lengths[:, None] + torch.arange(self.num_rows)).flatten()
        history = History(
            guessed.repeat_interleave(self.num_rows, 0),
            lengths.clamp(max=self.options.total_length - 1),
            self.source_ids.repeat_interleave(self.num_rows, 0),
            self.source_lengths.repeat_interleave(self.num_rows, 0),
        )
        return self._rules(logits.flatten(0, 1)[:, None], history)[:, 0].view_as(logits)

    def _keep_right(self, best: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor]:
        """Write the tokens that are certain; return how many [B], and who is finished [B]."""
        counts = []
        for document, tokens in enumerate(best.tolist()):
            room = self.options.total_length - int(self.lengths[document])
            most = min(room, 1 + int(is_right[document].sum()))
            counts.append(self._write(document, tokens[:most]))
        kept = torch.tensor(counts, device=best.device)
        self.lengths = self.lengths + torch.tensor(counts)
        self.num_written = self.num_written + kept[:, None]
        is_full = (self.lengths >= self.options.total_length).to(best.device)
        return kept, self.is_ended[:, 0] | is_full

    def _write(self, document: int, tokens: list[int]) -> int:
        """Append tokens up to the first that ends the text; return how many."""
        first = int(self.lengths[document])
        written = self.tokens[document, 0, 1:first].tolist()
        for count, token in enumerate(tokens, start=1):
            written.append(token)
            self.tokens[document, 0, first + count - 1] = token
            if token in self.options.eos_token_ids or (
                self.options.stop_strings and _ends_in_stop_string(written, self.options)
            ):
                self.is_ended[document] = True
                return count
        return len(tokens)

    def _record(self, scores: Tensor, kept: Tensor) -> None:
        if self.options.output_scores:
            counts = kept.tolist()
            for steps, rows, count in zip(self.step_scores, scores.cpu(), counts, strict=True):
                steps += [row[None].clone() for row in rows[:count]]

    def _guess(self) -> Tensor:
        """Return what follows each document's last tokens where its source has them, [B, N].

        The first place counts, and the longest run of last tokens that the source has.
        """
        num_guesses = self.num_rows - 1
        guesses = self.tokens.new_full((len(self.tokens), num_guesses), self._pad)
        for document, length in enumerate(self.lengths.tolist()):
            source = self.source_ids[document, : int(self.source_lengths[document])]
            text = self.tokens[document, 0, :length]
            found = _what_follows(source, text, self.options.max_matching_ngram_size)
            guesses[document, : len(found[:num_guesses])] = found[:num_guesses]
        return guesses


def _what_follows(source: Tensor, text: Tensor, longest: int) -> Tensor:
    """Return the source [n] from behind the first place that has the end of a text [m]."""
    for size in range(min(longest, len(text) - 1, len(source) - 1), 0, -1):
        is_match = (source[:-1].unfold(0, size, 1) == text[-size:]).all(-1)
        if bool(is_match.any()):
            return source[int(is_match.int().argmax()) + size :]
    return source[:0]


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
    search: type[Search] = BeamSearch if options.num_beams > 1 else RowSearch
    if options.prompt_lookup_num_tokens is not None:
        search = LookupSearch
    return search(options, sources, seeds, device)


def _step(parents: Tensor | None, is_finished: Tensor, is_failed: Tensor) -> Step:
    # The one place where the host waits for the device.
    finished, failed = torch.stack([is_finished, is_failed]).tolist()
    return Step(parents, finished, failed)


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


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _ends_in_stop_string(tokens: list[int], options: GenerationConfig) -> bool:
    """Return whether a stop string ends within the text of the last token."""
    assert options.text_of is not None
    # A token has at least one byte of text, so that a longer tail cannot matter.
    tail = tokens[-max(len(stop.encode()) for stop in options.stop_strings) :]
    before, text = options.text_of(tail[:-1]), options.text_of(tail)
    # A character whose bytes are spread over tokens changes when its last one comes.
    same = len(_common_prefix([list(before), list(text)]))
    starts = ((stop, max(0, same + 1 - len(stop))) for stop in options.stop_strings)
    return any(stop in text[start:] for stop, start in starts)


def _common_prefix(rows: list[list[_Item]]) -> list[_Item]:
    """Return the longest beginning that all rows share."""
    prefix = []
    for items in zip(*rows, strict=False):
        if any(item != items[0] for item in items):
            break
        prefix.append(items[0])
    return prefix
