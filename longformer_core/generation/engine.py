"""Decode documents of any lengths and options together: each comes when there is room, each leaves
when it is done.

Documents wait in the order of their arrival, are encoded a pack at a time, and join those that
decode already.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from longformer_core.attention.global_attention import Form
from longformer_core.errors import LongformerError, OutOfMemoryError
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.decode_step import record_cuda_graph
from longformer_core.generation.memory_budget import MemoryBudget
from longformer_core.generation.request import Generation, GenerationHandle, Request
from longformer_core.generation.running_batch import Model, RunningBatch
from longformer_core.scheduling.checks import check_document
from longformer_core.scheduling.engine import DocumentEngine
from longformer_core.scheduling.handle import Tokens

# Rows that step together: the weights' share of a step is small by then.
_MAX_ROWS = 256


class Engine(DocumentEngine[Request, Generation]):
    """Decode documents; a document's text is its own alone, whatever else is decoded beside it.

    Units: `batch_tokens` counts source tokens encoded at once and `max_rows` sequences decoded at
    once (documents times beams); a document beyond either goes alone. `memory_bytes` is what
    documents may take beside the weights; by default most of what is free now.
    Numerics: what is decoded together changes sums in their last bit, as any batching does; a token
    changes only where two scores were equal up to that.
    Failures: when something goes wrong for several documents at once, they are halved until it is
    one document's error; this finds a bad document, and also the size that fits into memory.

    >>> engine = Engine(model)
    >>> handle = engine.add([0, 31, 7, 2], options)
    >>> text = [t for event in handle.events() if isinstance(event, Tokens) for t in event.ids]
    >>> text == handle.result().sequences[0]
    True
    >>> requests = [Request([0, 31, 7, 2], options), Request([0, 5, 2], options)]
    >>> sorted(index for index, generation in engine.run(requests) if generation.error is None)
    [0, 1]
    """

    def __init__(
        self,
        model: Model,
        *,
        batch_tokens: int | None = None,
        max_rows: int = _MAX_ROWS,
        memory_bytes: int | None = None,
        form: Form = "auto",
        cuda_graphs: bool = False,
    ) -> None:
        """Keep the model, which the engine alone should use while it decodes.

        form: of the cross-attention's source; see `attention.cross_attention.CrossAttentionCache`.
        cuda_graphs: on a CUDA device, record a step and replay it while the same documents decode.
        Raises: ConfigError for a budget below 1.
        """
        super().__init__(
            model.device,
            self._num_bytes,
            batch_tokens=batch_tokens,
            max_rows=max_rows,
            memory_bytes=memory_bytes,
        )
        self._model, self._form = model, form
        self._record = record_cuda_graph if cuda_graphs and model.device.type == "cuda" else None
        self._budget = MemoryBudget(
            model.config, model.dtype, model.device, form, self._memory_bytes
        )
        self._batches: list[RunningBatch] = []

    def add(
        self,
        input_ids: Sequence[int],
        options: GenerationConfig,
        deadline_s: float | None = None,
        *,
        global_positions: Sequence[int] | None = None,
        seed: int | None = None,
        valid: Sequence[bool] | None = None,
        on_event: Callable[[Tokens | Generation], None] | None = None,
    ) -> GenerationHandle:
        """Decode a document as soon as there is room; return at once. Any thread may call this.

        The other arguments are those of `Request` and of `submit`.
        Raises: ConfigError when the model cannot decode with the options.
        """
        request = Request(input_ids, options, global_positions, seed, valid)
        return self.submit(request, deadline_s, on_event=on_event)

    def _turn(self) -> None:
        self._admit()
        for batch in list(self._batches):
            self._step(batch)
        self._batches = [batch for batch in self._batches if batch.handles]

    def _admit(self) -> None:
        """Encode the next pack, if there is room for one, and let it join those that decode."""
        pack = self._next_pack()
        if not pack:
            return
        with self._guarded(pack):
            new = RunningBatch(self._model, pack, self._form, self._record)
            self._tick()
            same = next((batch for batch in self._batches if batch.kind == new.kind), None)
            if same is None:
                self._batches.append(new)
                return
            with self._guarded([*same.handles, *new.handles]):
                same.extend(new)

    def _step(self, batch: RunningBatch) -> None:
        """Extend the documents of a batch by one token; those that are done leave."""
        done: list[tuple[GenerationHandle, Generation]] = []
        with self._guarded(batch.handles):
            done = batch.step()
        self._tick()
        for handle, outcome in done:
            if outcome.sequences:
                handle.tell(outcome.sequences[0])
            self._finish(handle, outcome)

    def _leave(self, documents: Sequence[GenerationHandle]) -> None:
        gone = set(documents)
        for batch in list(self._batches):
            with self._guarded(batch.handles):
                batch.remove({i for i, handle in enumerate(batch.handles) if handle in gone})
        self._batches = [batch for batch in self._batches if batch.handles]

    def _drop(self, documents: Sequence[GenerationHandle]) -> None:
        self._batches = [b for b in self._batches if set(documents).isdisjoint(b.handles)]

    def _check_options(self, requests: Sequence[Request]) -> None:
        for options in {request.options for request in requests}:
            options.check(self._model.config)

    def _prepare(self, request: Request) -> Request:
        config = self._model.config
        check_document(
            request,
            vocab_size=config.vocab_size,
            max_length=config.max_encoder_position_embeddings,
        )
        if self._budget.num_bytes([request]) > self._budget.memory_bytes:
            raise self._budget.does_not_fit(request)
        if request.seed is not None or not request.options.do_sample:
            return request
        # Drawn once, so that a document that begins again says the same.
        return dataclasses.replace(request, seed=torch.Generator().seed() & (2**63 - 1))

    def _num_bytes(
        self, pack: Sequence[GenerationHandle], running: Sequence[GenerationHandle]
    ) -> int:
        return self._budget.num_bytes([h.request for h in pack], [h.request for h in running])

    def _failure(self, error: LongformerError) -> Generation:
        return Generation([], [], error)

    def _does_not_fit(self, request: Request) -> OutOfMemoryError:
        return self._budget.does_not_fit(request)
