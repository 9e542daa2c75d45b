"""Decode many documents: pack them, step them together, let each leave when it is done."""

import logging
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from longformer_core.errors import (
    ConfigError,
    LongformerError,
    NonFiniteError,
    OutOfMemoryError,
    ShapeError,
    TooLongError,
)
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.search import Search, start_search
from longformer_core.layout import Layout, default_global_positions
from longformer_core.models.led import LEDForConditionalGeneration

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """One document to decode.

    global_positions: the tokens that attend to everything; None takes the package's default.
    seed: what sampling starts from; None draws a fresh one.
    """

    input_ids: Sequence[int]
    options: GenerationConfig
    global_positions: Sequence[int] | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What became of one document: its sequences, or the error that kept it from having any.

    sequences: generated ids, best first, without start token and padding; an end token is kept.
    scores: summed log-probability / length ** length_penalty, one per sequence.
    """

    sequences: list[list[int]]
    scores: list[float]
    error: LongformerError | None = None


@dataclass(frozen=True, slots=True)
class _Document:
    index: int
    request: Request

    @property
    def length(self) -> int:
        return len(self.request.input_ids)


_Outcome = tuple[int, Generation]


class Engine:
    """Decode documents of any lengths and options; a document's text is its own alone.

    Documents with equal options are packed by token count, longest first, and leave as soon as
    they are done. One that fails takes nobody with it: its pack is decoded again without it.
    Units: `batch_tokens` counts source tokens encoded at once and `max_rows` sequences decoded at
    once (documents times beams); a document beyond either goes alone.
    Numerics: the pack's composition changes sums in their last bit, as any batching does; a token
    changes only where two scores were equal up to that.
    """

    def __init__(
        self, model: LEDForConditionalGeneration, *, batch_tokens: int, max_rows: int = 256
    ) -> None:
        """Keep the model, which the engine alone should use while it runs.

        Raises: ConfigError for a budget below 1.
        """
        for name, value in (("batch_tokens", batch_tokens), ("max_rows", max_rows)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or greater")
        self._model = model
        self._batch_tokens = batch_tokens
        self._max_rows = max_rows

    def run(
        self, requests: Sequence[Request], on_progress: Callable[[], None] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """Yield each request's index and outcome, in order of completion.

        on_progress: called after every encoded pack and every step; what it raises comes through.
        Raises: ConfigError, before any work, when the model cannot decode with some options.
        """
        groups: dict[GenerationConfig, list[_Document]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.options, []).append(_Document(index, request))
        for options in groups:
            options.check(self._model.config)
        return self._run_groups(groups, on_progress or _nothing)

    def _run_groups(
        self, groups: dict[GenerationConfig, list[_Document]], on_progress: Callable[[], None]
    ) -> Iterator[_Outcome]:
        for options, documents in groups.items():
            fitting = []
            for document in documents:
                error = self._unfit(document)
                if error is None:
                    fitting.append(document)
                else:
                    yield document.index, Generation([], [], error)
            waiting = self._packs(fitting, options)[::-1]
            while waiting:
                waiting += yield from self._run_pack(waiting.pop(), options, on_progress)

    def _unfit(self, document: _Document) -> LongformerError | None:
        limit = self._model.config.max_encoder_position_embeddings
        if document.length == 0:
            return ShapeError("the document has no tokens; give at least one")
        if document.length > limit:
            return TooLongError(
                f"the document has {document.length} tokens but the encoder has {limit} "
                "positions; shorten it or choose a model with more positions"
            )
        return None

    def _packs(
        self, documents: list[_Document], options: GenerationConfig
    ) -> list[list[_Document]]:
        """Split documents, longest first, into packs within both budgets."""
        max_documents = max(1, self._max_rows // options.rows_per_document)
        packs: list[list[_Document]] = []
        room = 0
        for document in sorted(documents, key=lambda document: -document.length):
            if not packs or document.length > room or len(packs[-1]) == max_documents:
                packs.append([])
                room = self._batch_tokens
            packs[-1].append(document)
            room -= document.length
        return packs

    def _run_pack(
        self, pack: list[_Document], options: GenerationConfig, on_progress: Callable[[], None]
    ) -> Generator[_Outcome, None, list[list[_Document]]]:
        """Yield the outcomes of one pack, and return the packs to decode in place of what failed.

        Whatever goes wrong, the unfinished documents are halved until it is one document's error:
        this finds a bad document, and also the size that fits into memory.
        """
        work = _decode(self._model, options, pack)
        left = {document.index: document for document in pack}
        while left:
            outcomes, error = _attempt(work)
            if error is not None:
                documents = list(left.values())
                if len(documents) == 1:
                    yield documents[0].index, Generation([], [], _explain(error, documents[0]))
                    return []
                _warn(error, documents)
                middle = len(documents) // 2
                return [documents[middle:], documents[:middle]]
            on_progress()
            for index, generation in outcomes:
                del left[index]
                yield index, generation
        return []


@torch.inference_mode()
def _decode(
    model: LEDForConditionalGeneration, options: GenerationConfig, documents: list[_Document]
) -> Iterator[list[_Outcome]]:
    """Encode documents, then step them until all are done; yield what each piece of work ended."""
    requests = [document.request for document in documents]
    layout = Layout.from_lengths(
        [document.length for document in documents],
        [_global_positions(request) for request in requests],
        device=model.device,
    )
    texts = [torch.as_tensor(request.input_ids, dtype=torch.int64) for request in requests]
    search = start_search(options, texts, [request.seed for request in requests], model.device)
    num_rows = search.num_rows
    states = model.encode(torch.cat(texts).to(model.device), layout)
    source = model.source(states, layout, num_rows=num_rows * (options.total_length - 1))
    # Where it is the source that holds them, it has a copy; where not, nobody needs them.
    del states
    cache = model.new_cache(len(documents) * num_rows, options.total_length - 1)
    yield []
    while True:
        token_ids, positions = search.inputs()
        logits = model.decode_step(token_ids, positions, cache, source, num_rows)
        step = search.advance(logits)
        is_done = [f or n for f, n in zip(step.is_finished, step.is_failed, strict=True)]
        yield [
            (document.index, _generation(search, slot, step.is_failed[slot]))
            for slot, document in enumerate(documents)
            if is_done[slot]
        ]
        rows = step.parents
        if any(is_done):
            staying = [slot for slot in range(len(documents)) if not is_done[slot]]
            if not staying:
                return
            documents = [documents[slot] for slot in staying]
            slots = torch.tensor(staying, dtype=torch.int64, device=model.device)
            search.keep(slots)
            source = source.select(slots)
            rows = torch.arange(len(logits), device=model.device) if rows is None else rows
            rows = rows.view(-1, num_rows).index_select(0, slots).flatten()
        if rows is not None:
            cache = cache.reorder(rows)


def _generation(search: Search, slot: int, is_failed: bool) -> Generation:
    if not is_failed:
        sequences, scores = search.result(slot)
        return Generation(sequences, scores)
    num_tokens = int(search.lengths[slot]) - 2
    error = NonFiniteError(
        f"the document's logits became NaN or infinite after {num_tokens} tokens; decode it in "
        "float32, or look for broken weights"
    )
    return Generation([], [], error)


def _global_positions(request: Request) -> Sequence[int]:
    if request.global_positions is None:
        return default_global_positions(len(request.input_ids))
    return request.global_positions


def _attempt(work: Iterator[list[_Outcome]]) -> tuple[list[_Outcome], Exception | None]:
    """Do the next piece of work, and hand back what it raised instead of raising it."""
    try:
        return next(work), None
    except Exception as error:  # noqa: BLE001 - any error is some document's until shown otherwise
        # The traceback's frames hold the pack's tensors, and the error may live for long.
        traceback.clear_frames(error.__traceback__)
        return [], error


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch reports a failed allocation as a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _warn(error: Exception, documents: list[_Document]) -> None:
    logger.warning(
        "decoding %d documents of %d tokens together failed (%s: %s); trying again in halves%s",
        len(documents),
        sum(document.length for document in documents),
        type(error).__name__,
        error,
        "; a smaller batch_tokens avoids this" if _is_out_of_memory(error) else "",
    )


def _explain(error: Exception, document: _Document) -> LongformerError:
    """Return what to tell of one document's error; an error of ours speaks for itself."""
    if isinstance(error, LongformerError):
        return error
    explained: LongformerError
    if _is_out_of_memory(error):
        explained = OutOfMemoryError(
            f"a document of {document.length} tokens with "
            f"{document.request.options.rows_per_document} rows does not fit into memory even "
            "alone; shorten it, lower num_beams, or use a larger device"
        )
    else:
        explained = LongformerError(f"decoding failed with {type(error).__name__}: {error}")
    explained.__cause__ = error
    return explained


def _nothing() -> None:
    """Stand in for a progress callback that the caller left out."""
