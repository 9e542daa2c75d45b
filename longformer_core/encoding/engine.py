"""Read documents of any lengths together, a pack at a time, and answer each by itself."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from longformer_core.encoding.model import Model
from longformer_core.encoding.pack import encode_pack, pooler_of
from longformer_core.encoding.request import Encoding, EncodingHandle, EncodingRequest, Want
from longformer_core.errors import ConfigError, LongformerError, OutOfMemoryError, ShapeError
from longformer_core.ops.chunking import most_rows
from longformer_core.ops.linear import widest_dtype
from longformer_core.scheduling.checks import check_document, check_positions, check_token_ids
from longformer_core.scheduling.engine import DocumentEngine
from longformer_core.scheduling.handle import Tokens
from longformer_core.scheduling.memory import encoding_numbers

_WANTS = ("states", "first", "mean", "pooler")
# Results are float32.
_RESULT_BYTES = 4


class EncodingEngine(DocumentEngine[EncodingRequest, Encoding]):
    """Read documents; what is found of one is its own alone, whatever else is read beside it.

    The model is a Longformer or LED with any of their heads but the one that writes, or without:
    of an LED without a head, or with the head that writes, only the encoder is used.
    Units: `batch_tokens` counts tokens read at once; a document beyond it goes alone.
    `memory_bytes` is what documents may take beside the weights; by default most of what is free.
    Numerics: what is read together changes sums in their last bit, as any batching does.
    Failures: as of `Engine`.

    >>> engine = EncodingEngine(classifier)
    >>> engine.add([0, 31, 7, 2]).result().logits.shape
    torch.Size([2])
    >>> requests = [EncodingRequest([0, 31, 7, 2]), EncodingRequest([0, 5, 2], want=["mean"])]
    >>> sorted(index for index, encoding in engine.run(requests) if encoding.error is None)
    [0, 1]
    """

    def __init__(
        self, model: Model, *, batch_tokens: int | None = None, memory_bytes: int | None = None
    ) -> None:
        """Keep the model, which the engine alone should use while it reads.

        Raises: ConfigError for a budget below 1.
        """
        super().__init__(
            model.device,
            lambda pack, _: self._num_bytes([handle.request for handle in pack]),
            batch_tokens=batch_tokens,
            max_rows=None,
            memory_bytes=memory_bytes,
        )
        self._model = model
        self._itemsize = widest_dtype(model.dtype, model.device).itemsize
        config = model.config
        special = (config.bos_token_id, config.pad_token_id, getattr(config, "sep_token_id", None))
        self._special = torch.tensor(
            [token for token in (*special, *config.eos_token_ids) if token is not None]
        )

    def add(
        self,
        input_ids: Sequence[int],
        deadline_s: float | None = None,
        *,
        global_positions: Sequence[int] | None = None,
        valid: Sequence[bool] | None = None,
        token_type_ids: Sequence[int] | None = None,
        want: Sequence[Want] = (),
        logit_positions: Sequence[int] = (),
        mean_positions: Sequence[int] | None = None,
        spans: Sequence[tuple[int, int]] = (),
        on_event: Callable[[Tokens | Encoding], None] | None = None,
    ) -> EncodingHandle:
        """Read a document as soon as there is room; return at once. Any thread may call this.

        The arguments are those of `EncodingRequest` and of `submit`.
        """
        request = EncodingRequest(
            input_ids,
            global_positions,
            valid,
            token_type_ids,
            want,
            logit_positions,
            mean_positions,
            spans,
        )
        return self.submit(request, deadline_s, on_event=on_event)

    def _turn(self) -> None:
        pack = self._next_pack()
        found: list[Encoding] = []
        with self._guarded(pack):
            found = encode_pack(self._model, [handle.request for handle in pack])
        self._tick()
        for handle, encoding in zip(pack, found, strict=False):
            self._finish(handle, encoding)

    def _leave(self, documents: Sequence[EncodingHandle]) -> None:
        """Between two turns nothing runs."""

    def _drop(self, documents: Sequence[EncodingHandle]) -> None:
        """Nothing is kept of a pack that fails."""

    def _check_options(self, requests: Sequence[EncodingRequest]) -> None:
        """What a model cannot give is the error of the document that asks for it."""

    def _prepare(self, request: EncodingRequest) -> EncodingRequest:
        config, num_tokens = self._model.config, len(request.input_ids)
        check_document(
            request, vocab_size=config.vocab_size, max_length=self._model.max_source_tokens
        )
        self._check_asked(request)
        check_positions("logit_positions", request.logit_positions, num_tokens)
        if request.mean_positions is not None:
            check_positions("mean_positions", request.mean_positions, num_tokens)
            if len(request.mean_positions) == 0:
                raise ShapeError("mean_positions are empty; give at least one, or None")
        for first, last in request.spans:
            if not 0 <= first < last <= num_tokens:
                raise ShapeError(
                    f"spans hold ({first}, {last}) but the document has {num_tokens} tokens; a "
                    "span starts at 0 or later and ends behind its start, at the end at the latest"
                )
        if request.token_type_ids is not None:
            self._check_types(request.token_type_ids, num_tokens)
        ids = torch.as_tensor(request.input_ids)
        if self._model.head_kind == "end" and not bool(
            torch.isin(ids, torch.tensor(config.eos_token_ids)).any()
        ):
            raise ShapeError(
                f"the document has no end token (ids {list(config.eos_token_ids)}), so there is no "
                "state to classify"
            )
        changes: dict[str, Sequence[int]] = {}
        if request.global_positions is None:
            mask = self._model.default_global_mask(ids[None])[0]
            changes["global_positions"] = mask.nonzero()[:, 0].tolist()
        if "mean" in request.want and request.mean_positions is None:
            is_valid = torch.as_tensor(
                [True] * num_tokens if request.valid is None else request.valid, dtype=torch.bool
            )
            is_text = is_valid & ~torch.isin(ids, self._special)
            for flags in (is_text, is_valid, torch.ones_like(is_valid)):
                if bool(flags.any()):
                    changes["mean_positions"] = flags.nonzero()[:, 0].tolist()
                    break
        request = dataclasses.replace(request, **changes)  # type: ignore[arg-type]
        if self._num_bytes([request]) > self._memory_bytes:
            raise self._does_not_fit(request)
        return request

    def _check_asked(self, request: EncodingRequest) -> None:
        """Raise ConfigError for what the model cannot give, and for nothing asked."""
        kind, name = self._model.head_kind, type(self._model).__name__
        for want in request.want:
            if want not in _WANTS:
                raise ConfigError(f"want holds {want!r}; choose from {list(_WANTS)}")
        if "pooler" in request.want and pooler_of(self._model) is None:
            raise ConfigError(f"want holds 'pooler' but the {name} has none; take 'first'")
        if len(request.logit_positions) and kind != "masked":
            raise ConfigError(
                f"logit_positions are those of a masked language model, and a {name} is none"
            )
        is_answered = kind == "masked" and len(request.logit_positions)
        if kind in (None, "masked") and not (is_answered or request.want or request.spans):
            raise ConfigError(
                f"nothing is asked of a {name}; set want, spans"
                + (" or logit_positions" if kind == "masked" else "")
            )

    def _check_types(self, types: Sequence[int], num_tokens: int) -> None:
        count = getattr(self._model.config, "type_vocab_size", None)
        if count is None:
            raise ConfigError(
                f"token_type_ids are given but a {type(self._model).__name__} has no token types"
            )
        if len(types) != num_tokens:
            raise ShapeError(
                f"token_type_ids are {len(types)} but the document has {num_tokens} tokens; give "
                "one for each"
            )
        check_token_ids("token_type_ids", types, count)

    def _num_bytes(self, requests: Sequence[EncodingRequest]) -> int:
        """Return what reading documents takes beside the weights, at most."""
        config = self._model.config
        d, f = config.hidden_size, config.intermediate_size
        lengths = [len(request.input_ids) for request in requests]
        num_tokens, at_once = sum(lengths), most_rows(self._model.device)
        numbers = encoding_numbers(d, f, num_tokens, at_once)
        kind, results = self._model.head_kind, 0
        if kind in ("end", "span") and hasattr(self._model, "decode_source"):
            # The decoder holds the encoder's states as well, and takes all its rows at once.
            numbers = max(numbers, num_tokens * (7 * d + getattr(config, "decoder_ffn_dim", f)))
        if kind in ("tokens", "span"):
            results += num_tokens * (config.num_labels if kind == "tokens" else 2)
        for request, length in zip(requests, lengths, strict=True):
            results += d * (length * ("states" in request.want) + 3 + len(request.spans))
            results += len(request.logit_positions) * config.vocab_size
            # Rows whose means are taken are copied.
            results += d * sum(last - first for first, last in request.spans)
            results += d * length * ("mean" in request.want)
        return numbers * self._itemsize + results * _RESULT_BYTES

    def _failure(self, error: LongformerError) -> Encoding:
        return Encoding(error=error)

    def _does_not_fit(self, request: EncodingRequest) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"a document of {len(request.input_ids)} tokens does not fit into memory even alone: "
            f"it needs about {self._num_bytes([request]) / 1e9:.3g} GB beside the weights, of "
            f"{self._memory_bytes / 1e9:.3g} GB; shorten it, ask for less, or use a larger device"
        )
