"""Documents that are decoded side by side: one source, one cache, a search for each set of options.

Shape letters: N documents, b rows of each, R = N * b rows, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longformer_core.attention.cross_attention import CrossAttentionCache
from longformer_core.attention.global_attention import Form
from longformer_core.config import LEDConfig
from longformer_core.errors import NonFiniteError
from longformer_core.generation.decode_step import DecodeStep, Record, StepModel
from longformer_core.generation.kv_cache import BeamKVCache
from longformer_core.generation.request import Generation, GenerationHandle
from longformer_core.generation.search.base import Search, Step
from longformer_core.generation.search.beam import BeamSearch
from longformer_core.generation.search.factory import start_search
from longformer_core.layout import Layout
from longformer_core.ops.compaction import compacted
from longformer_core.scheduling.packing import packed_layout


class Model(StepModel, Protocol):
    """What the engine asks of a model; see `models.led.LEDForConditionalGeneration`."""

    config: LEDConfig

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, input_ids: Tensor, layout: Layout) -> Tensor: ...

    def source(
        self, states: Tensor, layout: Layout, *, num_rows: Sequence[int], form: Form
    ) -> CrossAttentionCache: ...

    def new_cache(
        self,
        num_documents: int,
        rows_per_document: int,
        *,
        max_steps: Sequence[int],
        is_speculative: bool,
        has_fixed_shapes: bool,
    ) -> BeamKVCache: ...


@dataclass
class _Group:
    """The documents with one set of options: their search, and their places in the batch."""

    search: Search
    places: list[int]


class RunningBatch:
    """Documents of one kind that step together; they come and go while others go on.

    The weights are read once per step for all of them.
    """

    def __init__(
        self,
        model: Model,
        handles: Sequence[GenerationHandle],
        form: Form,
        record: Record | None = None,
    ) -> None:
        """Encode documents and begin their searches."""
        self.handles = list(handles)
        requests = [handle.request for handle in handles]
        self.kind = requests[0].kind
        self.num_rows_each, is_speculative = self.kind
        texts = [torch.as_tensor(request.input_ids, dtype=torch.int64) for request in requests]
        layout = packed_layout(requests, model.device)
        states = model.encode(torch.cat(texts).to(model.device), layout)
        reads = [request.num_rows * request.num_steps for request in requests]
        self._source = model.source(states, layout, num_rows=reads, form=form)
        self._cache = model.new_cache(
            len(handles),
            self.num_rows_each,
            max_steps=[request.num_steps for request in requests],
            is_speculative=is_speculative,
            has_fixed_shapes=record is not None,
        )
        self._next_logits = DecodeStep(model, self._cache, self._source, record)
        self._groups: list[_Group] = []
        shared = [request.options.without_lengths for request in requests]
        for options in dict.fromkeys(shared):
            places = [i for i, own in enumerate(shared) if own == options]
            search = start_search(
                [requests[i].options for i in places],
                [texts[i] for i in places],
                [requests[i].seed for i in places],
                model.device,
            )
            self._groups.append(_Group(search, places))

    @property
    def num_rows(self) -> int:
        """Return how many rows step together."""
        return len(self.handles) * self.num_rows_each

    def extend(self, other: "RunningBatch") -> None:
        """Take over the documents of a batch that has not stepped yet."""
        first = len(self.handles)
        self._source.extend(other._source)
        self._cache.add([handle.request.num_steps for handle in other.handles])
        self._next_logits.forget()
        self.handles += other.handles
        for group in other._groups:
            places = [first + place for place in group.places]
            for mine in self._groups:
                if mine.search.options == group.search.options:
                    mine.search.extend(group.search)
                    mine.places += places
                    break
            else:
                self._groups.append(_Group(group.search, places))

    def step(self) -> list[tuple[GenerationHandle, Generation]]:
        """Extend all documents by one token; return those that are done, and let them go."""
        logits = self._logits().view(len(self.handles), self.num_rows_each, -1)
        parents = torch.arange(self.num_rows, device=logits.device).view(-1, self.num_rows_each)
        is_moved = False
        outcomes: dict[int, Generation] = {}
        for group in self._groups:
            step = group.search.advance(self._of(group, logits).flatten(0, 1))
            if step.parents is not None:
                is_moved = True
                self._put_parents(parents, group, step.parents)
            outcomes |= _outcomes(group, step)
        if is_moved:
            self._cache.reorder(parents.flatten())
        done = [(self.handles[place], outcome) for place, outcome in outcomes.items()]
        self._tell(outcomes)
        self.remove(outcomes)
        return done

    def _logits(self) -> Tensor:
        """Return the logits [R, V] after every row's newest token."""
        inputs = [group.search.inputs() for group in self._groups]
        tokens, positions = (torch.cat(parts) for parts in zip(*inputs, strict=True))
        if len(self._groups) > 1:
            order = torch.tensor([place for group in self._groups for place in group.places])
            back = order.argsort()
            positions = positions.view(-1, self.num_rows_each)[back].flatten()
            back = back.to(tokens.device)
            tokens = tokens.view(-1, self.num_rows_each)[back].flatten()
        return self._next_logits(tokens, positions)

    def _of(self, group: _Group, rows: Tensor) -> Tensor:
        """Return a group's part of [N, ...]."""
        if len(self._groups) == 1:
            return rows
        return rows[torch.tensor(group.places, device=rows.device)]

    def _put_parents(self, parents: Tensor, group: _Group, found: Tensor) -> None:
        """Write a search's parents, which count its own rows, into those of the batch [N, b]."""
        b = self.num_rows_each
        places = torch.tensor(group.places, device=parents.device)
        parents[places] = found.view(-1, b) % b + places[:, None] * b

    def _tell(self, ended: dict[int, Generation]) -> None:
        """Send the tokens that have become certain to whoever listens."""
        for group in self._groups:
            for slot, place in enumerate(group.places):
                if self.handles[place].is_streamed and place not in ended:
                    self.handles[place].tell(group.search.agreed(slot))

    def remove(self, places: Collection[int]) -> None:
        """Let documents go. The last ones take their places, so that few are moved."""
        if not places:
            return
        order = compacted(len(self.handles), places)
        new_place = {old: new for new, old in enumerate(order)}
        self.handles = [self.handles[place] for place in order]
        self._source.select(order)
        self._cache.select(order)
        self._next_logits.forget()
        for group in self._groups:
            slots = [slot for slot, place in enumerate(group.places) if place in new_place]
            # In the order of the batch, so that a group that is all of it needs no index.
            slots.sort(key=lambda slot: new_place[group.places[slot]])
            group.places = [new_place[group.places[slot]] for slot in slots]
            group.search.keep(torch.tensor(slots, dtype=torch.int64))
        self._groups = [group for group in self._groups if group.places]


def _outcomes(group: _Group, step: Step) -> dict[int, Generation]:
    """Return what became of the documents that need no further step, by their places."""
    found = {}
    flags = zip(group.places, step.is_finished, step.is_failed, strict=True)
    for slot, (place, is_finished, is_failed) in enumerate(flags):
        if is_failed:
            num_tokens = int(group.search.lengths[slot]) - 2
            error = NonFiniteError(
                f"the document's logits became NaN or infinite after {num_tokens} tokens; decode "
                "it in float32, or look for broken weights"
            )
            found[place] = Generation([], [], error)
        elif is_finished:
            found[place] = _result(group.search, slot)
    return found


def _result(search: Search, slot: int) -> Generation:
    sequences, scores = search.result(slot)
    if not search.options.output_scores:
        return Generation(sequences, scores)
    return Generation(
        sequences,
        scores,
        step_scores=search.scores_of(slot),
        beam_indices=search.beam_indices_of(slot) if isinstance(search, BeamSearch) else None,
    )
