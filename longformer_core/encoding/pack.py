"""One packed batch through a model, and each document's share of what comes out.

Shape letters: B documents, T packed tokens, d hidden size, K means, C labels or vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from longformer_core.encoding.model import HeadModel, Model, ReadingModel
from longformer_core.encoding.request import Encoding, EncodingRequest
from longformer_core.errors import NonFiniteError
from longformer_core.layout import Layout
from longformer_core.scheduling.packing import packed_layout


def encode_pack(model: Model, requests: Sequence[EncodingRequest]) -> list[Encoding]:
    """Return what is found of each document, in their order; those that read NaN have an error."""
    texts = [torch.as_tensor(request.input_ids, dtype=torch.int64) for request in requests]
    layout = packed_layout(requests, model.device)
    input_ids = torch.cat(texts).to(model.device)
    types: dict[str, Tensor] = {}
    if any(request.token_type_ids is not None for request in requests):
        own = [
            torch.zeros_like(text)
            if request.token_type_ids is None
            else torch.as_tensor(request.token_type_ids, dtype=torch.int64)
            for request, text in zip(requests, texts, strict=True)
        ]
        types["token_type_ids"] = torch.cat(own).to(model.device)
    states = model.encode(input_ids, layout, **types)
    found: list[dict[str, Tensor]] = [{} for _ in requests]
    _add_head(model, requests, states, layout, input_ids, found)
    _add_first(model, requests, states, layout, found)
    _add_means(requests, states, layout, found)
    for request, (start, end), own_found in zip(
        requests, pairwise(layout.cu_seqlens), found, strict=True
    ):
        if "states" in request.want:
            own_found["states"] = _result(states[start:end])
    return [_encoding(each) for each in found]


def _add_head(
    model: Model,
    requests: Sequence[EncodingRequest],
    states: Tensor,
    layout: Layout,
    input_ids: Tensor,
    found: list[dict[str, Tensor]],
) -> None:
    """Add the head's answers: of all tokens, or of those that the kind of head looks at."""
    kind, starts = model.head_kind, layout.cu_seqlens[:-1]
    if kind is None:
        return
    head = cast(HeadModel, model)
    if hasattr(model, "decode_source"):
        states = cast(ReadingModel, model).decode_source(states, layout, input_ids)
    if kind in ("tokens", "span"):
        parts = torch.split(_result(head.head_logits(states)), list(layout.lengths))
        for own, logits in zip(found, parts, strict=True):
            if kind == "tokens":
                own["logits"] = logits
            else:
                own["start_logits"], own["end_logits"] = logits.unbind(-1)
        return
    if kind == "masked":
        chosen: list[list[int]] = [list(request.logit_positions) for request in requests]
    elif kind == "end":
        ends = torch.tensor(model.config.eos_token_ids)
        flags = [torch.isin(torch.as_tensor(request.input_ids), ends) for request in requests]
        chosen = [[int(is_end.nonzero().max())] for is_end in flags]
    else:
        chosen = [[0] for _ in requests]
    slots = [start + place for start, own in zip(starts, chosen, strict=True) for place in own]
    if slots:
        rows = states[torch.tensor(slots, device=states.device)]
        parts = torch.split(_result(head.head_logits(rows)), [len(own) for own in chosen])
        for own, places, logits in zip(found, chosen, parts, strict=True):
            if places:
                own["logits"] = logits if kind == "masked" else logits[0]


def _add_first(
    model: Model,
    requests: Sequence[EncodingRequest],
    states: Tensor,
    layout: Layout,
    found: list[dict[str, Tensor]],
) -> None:
    for name in ("first", "pooler"):
        asked = [doc for doc, request in enumerate(requests) if name in request.want]
        if asked:
            slots = [layout.cu_seqlens[doc] for doc in asked]
            rows = states[torch.tensor(slots, device=states.device)]
            if name == "pooler":
                rows = pooler_of(model)(rows)
            for doc, row in zip(asked, _result(rows), strict=True):
                found[doc][name] = row


def pooler_of(model: Model) -> Any:
    """Return the module that makes pooled states [B, d] of the first tokens', None without one."""
    return getattr(getattr(model, "base", None), "pooler", None)


def _add_means(
    requests: Sequence[EncodingRequest],
    states: Tensor,
    layout: Layout,
    found: list[dict[str, Tensor]],
) -> None:
    """Add the means over positions and over spans, all of the pack at once."""
    groups: list[torch.Tensor] = []
    for start, request in zip(layout.cu_seqlens, requests, strict=False):
        if "mean" in request.want:
            groups.append(start + torch.as_tensor(request.mean_positions, dtype=torch.int64))
        groups += [torch.arange(start + first, start + last) for first, last in request.spans]
    if not groups:
        return
    lengths = torch.tensor([len(group) for group in groups], device=states.device)
    rows = states[torch.cat(groups).to(states.device)].float()
    means = iter(torch.segment_reduce(rows, "mean", lengths=lengths).cpu())
    for own, request in zip(found, requests, strict=True):
        if "mean" in request.want:
            own["mean"] = next(means)
        if request.spans:
            own["span_means"] = torch.stack([next(means) for _ in request.spans])


def _result(values: Tensor) -> Tensor:
    return values.float().cpu()


def _encoding(found: dict[str, Tensor]) -> Encoding:
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            return Encoding(
                error=NonFiniteError(
                    f"the document's {name} became NaN or infinite; read it in float32, or look "
                    "for broken weights"
                )
            )
    # Copies: a view would keep the results of the whole pack.
    return Encoding(**{name: values.clone() for name, values in found.items()})  # type: ignore[arg-type]
