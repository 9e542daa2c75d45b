"""Which tokens come next: what all searches share.

Documents advance together but independently: each has its own length, its own end and its own
randomness, and what a document gets does not depend on the others. State is tensors whose first
dimension is documents, and lists with an item for each, so that documents leave by indexing and
join by concatenation. A finished document must leave before the next step.
Shapes: B documents, K rows of each, V vocabulary, L longest output, S longest source, C candidates.
Source: transformers 5.23 `generate`, for what is kept, when a search ends, and every tie.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from longformer_core.errors import ConfigError
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.logits_processors import History, LogitsProcessors

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
    """Hold the sequences of several documents, and extend them.

    All have the same options but for the lengths.
    generators: what each document draws from, so that its text does not depend on its neighbours.
    step_scores: each document's scores of every step, [K, V] on the CPU, if they are asked for.
    Shapes: tokens [B, K, L]; lengths [B] on the CPU, start token included; scores [B, K];
    source_ids [B, S] and source_lengths [B], with S = 0 when no processor looks at the source;
    shortest and longest [B] on the CPU, see `History`.
    """

    _state: tuple[str, ...] = (
        "tokens",
        "lengths",
        "scores",
        "source_ids",
        "source_lengths",
        "shortest",
        "longest",
    )
    # Those whose last dimension is as wide as the widest document needs.
    _padded: tuple[str, ...] = ("tokens", "source_ids")
    _lists = ("generators", "step_scores")

    def __init__(
        self,
        options: Sequence[GenerationConfig],
        sources: Sequence[Tensor],
        seeds: Sequence[int | None],
        device: torch.device,
    ) -> None:
        self.options = options[0].without_lengths
        self._processors = LogitsProcessors(self.options, device)
        self._ends = torch.tensor(self.options.eos_token_ids, device=device)
        self.num_rows = self.options.rows_per_document
        self.shortest = torch.tensor([own.shortest_length for own in options])
        self.longest = torch.tensor([own.total_length for own in options])
        shape = (len(sources), self._num_sequences)
        start = self.options.decoder_start_token_id
        self.tokens = torch.full((*shape, int(self.longest.max())), start, device=device)
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
        return self._processors.needs_source

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
        """Return the scores of a document's steps, after the processors: [steps, K, V] on the CPU.

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
        for name in self._state:
            parts = [getattr(self, name), getattr(other, name)]
            if name in self._padded:
                width = max(part.shape[-1] for part in parts)
                parts = [pad(part, (0, width - part.shape[-1])) for part in parts]
            setattr(self, name, torch.cat(parts))
        for name in self._lists:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _process(self, scores: Tensor) -> Tensor:
        """Return what the options make of the next token's scores [B, K, V]; record it if asked."""
        history = History(
            self.tokens,
            self.lengths,
            self.source_ids,
            self.source_lengths,
            self.shortest,
            self.longest,
        )
        scores = self._processors(scores, history)
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
                [ends_in_stop_string(row[1 : length + 1], self.options) for row in rows]
                for rows, length in zip(tokens.tolist(), lengths, strict=True)
            ]
            is_end = is_end | torch.tensor(hits, device=is_end.device)
        return is_end


def step_of(parents: Tensor | None, is_finished: Tensor, is_failed: Tensor) -> Step:
    """Tell the host what a step did, in one message."""
    # The one place where the host waits for the device.
    finished, failed = torch.stack([is_finished, is_failed]).tolist()
    return Step(parents, finished, failed)


def ends_in_stop_string(tokens: list[int], options: GenerationConfig) -> bool:
    """Return whether a stop string ends within the text of the last token."""
    assert options.text_of is not None
    # A token has at least one byte of text, so that a longer tail cannot matter.
    tail = tokens[-max(len(stop.encode()) for stop in options.stop_strings) :]
    before, text = options.text_of(tail[:-1]), options.text_of(tail)
    # A character whose bytes are spread over tokens changes when its last one comes.
    same = len(common_prefix([list(before), list(text)]))
    starts = ((stop, max(0, same + 1 - len(stop))) for stop in options.stop_strings)
    return any(stop in text[start:] for stop, start in starts)


def common_prefix(rows: list[list[_Item]]) -> list[_Item]:
    """Return the longest beginning that all rows share."""
    prefix = []
    for items in zip(*rows, strict=False):
        if any(item != items[0] for item in items):
            break
        prefix.append(items[0])
    return prefix


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
