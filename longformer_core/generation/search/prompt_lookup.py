"""Greedy decoding with tokens guessed from the source.

Shapes: B documents, N guesses of each, V vocabulary, L longest output, S longest source.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.logits_processors import History
from longformer_core.generation.search.base import Step, ends_in_stop_string, step_of
from longformer_core.generation.search.sampling import RowSearch


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
        options: Sequence[GenerationConfig],
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
        return tokens.flatten(), positions.clamp(max=self.longest[:, None] - 2).flatten()

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
        return step_of(parents, is_finished, is_failed)

    def _after_each(self, logits: Tensor) -> Tensor:
        """Return the processed scores [B, N + 1, V], each row with the guesses before it."""
        places = self.lengths[:, None] + torch.arange(self.guesses.shape[1])
        at = places.clamp(max=self.tokens.shape[-1] - 1).to(logits.device)
        guessed = self.tokens.clone()
        guessed[:, 0].scatter_(-1, at, self.guesses)
        lengths = self.lengths[:, None] + torch.arange(self.num_rows)
        history = History(
            guessed.repeat_interleave(self.num_rows, 0),
            lengths.clamp(max=self.longest[:, None] - 1).flatten(),
            self.source_ids.repeat_interleave(self.num_rows, 0),
            self.source_lengths.repeat_interleave(self.num_rows, 0),
            self.shortest.repeat_interleave(self.num_rows),
            self.longest.repeat_interleave(self.num_rows),
        )
        return self._processors(logits.flatten(0, 1)[:, None], history)[:, 0].view_as(logits)

    def _keep_right(self, best: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor]:
        """Write the tokens that are certain; return how many [B], and who is finished [B]."""
        counts = []
        for document, tokens in enumerate(best.tolist()):
            left = int(self.longest[document] - self.lengths[document])
            most = min(left, 1 + int(is_right[document].sum()))
            counts.append(self._write(document, tokens[:most]))
        kept = torch.tensor(counts, device=best.device)
        self.lengths = self.lengths + torch.tensor(counts)
        self.num_written = self.num_written + kept[:, None]
        is_full = (self.lengths >= self.longest).to(best.device)
        return kept, self.is_ended[:, 0] | is_full

    def _write(self, document: int, tokens: list[int]) -> int:
        """Append tokens up to the first that ends the text; return how many."""
        first = int(self.lengths[document])
        written = self.tokens[document, 0, 1:first].tolist()
        for count, token in enumerate(tokens, start=1):
            written.append(token)
            self.tokens[document, 0, first + count - 1] = token
            if token in self.options.eos_token_ids or (
                self.options.stop_strings and ends_in_stop_string(written, self.options)
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

        The first place counts, and the most last tokens in a row that the source has.
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
