"""`generate` as published: a padded batch of sources in, padded token ids out, by the engine.

Shape letters: B documents, S source slots, K rows and r sequences of each, N longest output with
the start token, V vocabulary.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longformer_core.config import LEDConfig
from longformer_core.config.base import write_json
from longformer_core.errors import ShapeError, log_once
from longformer_core.generation.config import GENERATION_FILE, GenerationConfig
from longformer_core.generation.engine import Engine
from longformer_core.generation.request import Generation, GenerationHandle, Request
from longformer_core.generation.running_batch import Model
from longformer_core.models.outputs import LEDGenerateOutput
from longformer_core.scheduling.handle import Tokens

logger = logging.getLogger(__name__)


class Streamer(Protocol):
    """What transformers' streamers do: ids in, and a word when there will be no more."""

    def put(self, value: Tensor) -> None:
        """Take the next ids."""
        ...

    def end(self) -> None:
        """Take note of the end."""
        ...


class GenerationMixin:
    """A model that writes text: its options, and `generate`.

    generation_options: what its directory's generation_config.json holds, if it has one. Nobody
        else needs to understand it: a model with options that we do not have can still be trained.
    """

    config: LEDConfig
    generation_options: dict[str, Any] | None = None
    _generation_config: GenerationConfig | None = None

    @property
    def generation_config(self) -> GenerationConfig:
        """The options that `generate` uses unless told otherwise.

        Raises: ConfigError when the directory's options are not supported here.
        """
        if self._generation_config is None:
            self._generation_config = GenerationConfig.from_model_config(
                self.config, self.generation_options
            )
        return self._generation_config

    @generation_config.setter
    def generation_config(self, options: GenerationConfig) -> None:
        self._generation_config = options

    def save_generation_options(self, directory: str | Path) -> None:
        """Write generation_config.json: what was read, unless the options were used or set."""
        if self._generation_config is not None:
            self._generation_config.save_pretrained(directory)
        elif self.generation_options is not None:
            write_json(Path(directory) / GENERATION_FILE, self.generation_options)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        first_token_global: bool = True,
        seed: int | Sequence[int] | None = None,
        streamer: Streamer | None = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> Tensor | LEDGenerateOutput:
        """Return the ids [B * r, N] of the texts, start token first, padded on the right.

        The model decodes without dropout, whatever mode it is in. `Engine` does the same for
        documents that come and go, and keeps one document's error from the others.
        attention_mask: without one, padding tokens are hidden, unless padding ends a text too.
        global_attention_mask: without one the first token of each document is global, which the log
            says once; `first_token_global=False` leaves all of them local, as forward does.
        generation_config: instead of the model's own; `options` change single ones of either.
        seed: of sampling, one for each document or one to count up from; by default they are drawn
            from torch's generator. A seed gives the published text of `torch.manual_seed`.
        streamer: gets the ids of a single document's best sequence as soon as they are certain.
        Raises: ConfigError for options that are unknown or that the model cannot decode with;
            ShapeError, TooLongError, OutOfMemoryError, NonFiniteError for the first document that
            fails.
        """
        options_used = (generation_config or self.generation_config).replace(**options)
        requests = _requests(
            input_ids, attention_mask, global_attention_mask, options_used, first_token_global, seed
        )
        if streamer is not None and len(requests) != 1:
            raise ShapeError(f"a streamer takes one document; {len(requests)} are given")
        assert isinstance(self, torch.nn.Module)
        was_training = self.training
        self.eval()
        try:
            engine = Engine(cast(Model, self))
            if streamer is None:
                found = dict(engine.run(requests))
                outcomes = [found[place] for place in range(len(requests))]
            else:
                outcomes = [_stream(engine, requests[0], streamer)]
        finally:
            self.train(was_training)
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        output = _output(outcomes, options_used, input_ids.device)
        assert output.sequences is not None
        return output if return_dict_in_generate else output.sequences


def _requests(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    global_attention_mask: Tensor | None,
    options: GenerationConfig,
    first_token_global: bool,
    seed: int | Sequence[int] | None,
) -> list[Request]:
    """Cut the padding off both ends of each row [B, S]."""
    if input_ids.dim() != 2:
        raise ShapeError(f"input_ids have shape {list(input_ids.shape)}; give [documents, tokens]")
    for name, mask in (
        ("attention_mask", attention_mask),
        ("global_attention_mask", global_attention_mask),
    ):
        if mask is not None and mask.shape != input_ids.shape:
            raise ShapeError(
                f"{name} has shape {list(mask.shape)}; the ids have {list(input_ids.shape)}"
            )
    is_seen = _seen(input_ids, attention_mask, options).cpu()
    marks = None if global_attention_mask is None else global_attention_mask.cpu()
    if marks is None and first_token_global:
        log_once(
            logger,
            logging.WARNING,
            "generate was called without global_attention_mask: the first token of each document "
            "is global; first_token_global=False leaves it local",
        )
    if marks is not None and bool((is_seen & (marks < 0)).any()):
        raise ShapeError(
            "global_attention_mask is negative at tokens that attention_mask leaves; hide them in "
            "attention_mask too"
        )
    requests = []
    seeds = _seeds(seed, len(input_ids)) if options.do_sample else [None] * len(input_ids)
    for row, ids in enumerate(input_ids.cpu()):
        places = is_seen[row].nonzero()[:, 0]
        first, last = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        part = slice(first, last)
        positions: Sequence[int] | None = None if first_token_global else ()
        if marks is not None:
            positions = (marks[row, part] > 0).nonzero()[:, 0].tolist()
        valid = is_seen[row, part]
        requests.append(
            Request(
                ids[part].tolist(),
                options,
                positions,
                seeds[row],
                None if bool(valid.all()) else valid.tolist(),
            )
        )
    return requests


def _seen(input_ids: Tensor, attention_mask: Tensor | None, options: GenerationConfig) -> Tensor:
    if attention_mask is not None:
        return attention_mask.ne(0)
    pad = options.pad_token_id
    if pad is None or pad in options.eos_token_ids:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return input_ids.ne(pad)


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        return [int(drawn) for drawn in torch.randint(2**62, (count,))]
    if isinstance(seed, int):
        return [seed + row for row in range(count)]
    if len(seed) != count:
        raise ShapeError(f"there are {len(seed)} seeds for {count} documents; give one for each")
    return list(seed)


def _stream(engine: Engine, request: Request, streamer: Streamer) -> Generation:
    handle: GenerationHandle = engine.submit(request)
    streamer.put(torch.tensor([[request.options.decoder_start_token_id]]))
    try:
        for event in handle.events():
            if isinstance(event, Tokens):
                streamer.put(torch.tensor(event.ids))
    finally:
        handle.cancel()
    streamer.end()
    return handle.result()


def _output(
    outcomes: Sequence[Generation], options: GenerationConfig, device: torch.device
) -> LEDGenerateOutput:
    start = options.decoder_start_token_id
    rows = [[start, *ids] for outcome in outcomes for ids in outcome.sequences]
    pad = options.eos_token_ids[0] if options.pad_token_id is None else options.pad_token_id
    scores = [score for outcome in outcomes for score in outcome.scores]
    output = LEDGenerateOutput(
        sequences=_padded(rows, pad).to(device),
        sequences_scores=torch.tensor(scores, device=device),
    )
    if options.output_scores:
        steps = [outcome.step_scores for outcome in outcomes]
        output.scores = _stacked([s for s in steps if s is not None], device)
        origins = [outcome.beam_indices for outcome in outcomes]
        if options.num_beams > 1:
            lines = [
                [place * options.num_beams + row for row in line]
                for place, found in enumerate(origins)
                for line in found or ()
            ]
            output.beam_indices = _padded(lines, -1).to(device)
    return output


def _padded(rows: Iterable[Sequence[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    if not tensors:
        return torch.zeros(0, 0, dtype=torch.int64)
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def _stacked(scores: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Return one [B * K, V] per step; a document that has ended has -inf from then on."""
    if not scores:
        return ()
    padded = pad_sequence(list(scores), padding_value=-torch.inf)  # [steps, B, K, V]
    return tuple(step.flatten(0, 1).to(device) for step in padded)
