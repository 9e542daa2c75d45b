"""Few query rows against many keys: the encoder's global tokens.

The decoder's rows are those of `cross_attention.py`.

Keys and values come in two forms, equal up to rounding. The projected one computes them of all n
tokens. The absorbed one multiplies `key`'s weight into the few queries and `value`'s weight into
their few results, so that the states themselves are keys and values; `key`'s bias adds one constant
per row, which the softmax cancels. Where the kernels of `few_queries.py` run, the projected form is
one call for all documents.
Shape letters: T packed tokens, n tokens of one document, G global tokens of the batch, g of one
document, H heads, D head dimension, d = H * D.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from longformer_core.attention.dispatch import Implementation, choose
from longformer_core.attention.fused.segments import Segments
from longformer_core.errors import ConfigError
from longformer_core.layout import Layout
from longformer_core.ops.custom_op import fake_of, has_no_gradient, operator
from longformer_core.ops.dropout import dropout
from longformer_core.ops.linear import Linear, is_plain_linear

Form = Literal["auto", "projected", "absorbed"]


def global_attention(
    states: Tensor,
    layout: Layout,
    query: nn.Module,
    key: nn.Module,
    value: nn.Module,
    num_heads: int,
    *,
    form: Form = "auto",
    dropout_p: float = 0.0,
    implementation: Implementation = "auto",
) -> Tensor:
    """Let each global token attend to every valid token of its document, by its own projections.

    The form "auto" is the cheaper one for each document, and the projected one whenever `key` or
    `value` is more than a plain `nn.Linear` (see `is_plain_linear`). With `dropout_p` each
    probability is dropped with that chance and the others scaled to make up. The implementation is
    of the projected form, as in `window_attention`; all but "fused" are one.
    Shapes: states [T, d]; returns [G, d], in the order of `layout.global_index`.
    Numerics: softmax in float32 (float64 for float64 inputs).
    Raises: ConfigError when "absorbed" is asked for and `key` or `value` is not plain, and when
        "fused" is and cannot run.
    """
    d = states.shape[-1]
    queries = query(states.index_select(0, layout.global_index))
    queries = queries.view(-1, num_heads, d // num_heads) / math.sqrt(d // num_heads)
    if torch.compiler.is_compiling() and are_plain(key, value, required=False):
        weights = (key.weight, key.bias, value.weight, value.bias)
        out: Tensor = _rows_in_a_graph(
            queries, states, *weights, layout.number, form, implementation
        )
        return out
    return _rows(queries, states, layout, key, value, form, dropout_p, implementation)


@operator("global_attention")
def _rows_in_a_graph(
    queries: Tensor,
    states: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    layout: int,
    form: str,
    implementation: str,
) -> Tensor:
    """Compute `_rows` as one node of a compiled graph, whatever the documents; not in training."""
    key, value = _module_of(key_weight, key_bias), _module_of(value_weight, value_bias)
    return _rows(queries, states, Layout.of_number(layout), key, value, form, 0.0, implementation)


@fake_of(_rows_in_a_graph)
def _(queries: Tensor, *_: object) -> Tensor:
    return queries.new_empty(len(queries), queries.shape[1] * queries.shape[2])


has_no_gradient(_rows_in_a_graph, "compiled graphs of encoders are for inference")


def _module_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.device("meta"):
        module = Linear(weight.shape[1], weight.shape[0])
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def _rows(
    queries: Tensor,
    states: Tensor,
    layout: Layout,
    key: nn.Module,
    value: nn.Module,
    form: str,
    dropout_p: float,
    implementation: str,
) -> Tensor:
    """Compute `global_attention` of scaled queries [G, H, D]."""
    documents = [
        _Document(rows, states[start:end], _part(layout.is_valid, start, end), dropout_p)
        for rows, (start, end) in zip(
            torch.split(queries, list(layout.num_globals)), pairwise(layout.cu_seqlens), strict=True
        )
    ]
    outputs: dict[int, Tensor] = {}
    absorbed = [
        index
        for index, document in enumerate(documents)
        if form == "absorbed" or (form == "auto" and document.is_cheaper_absorbed)
    ]
    if absorbed and are_plain(key, value, required=form == "absorbed"):
        results = _absorbed([documents[index] for index in absorbed], key, value)
        outputs.update(zip(absorbed, results, strict=True))
    projected = [
        index
        for index, document in enumerate(documents)
        if index not in outputs and len(document.queries)
    ]
    if choose(implementation, states.device, states.dtype, queries.shape[2]) != "fused":
        outputs.update((index, _projected(documents[index], key, value)) for index in projected)
    elif projected:
        results = _projected_by_kernel(queries, states, layout, projected, key, value, dropout_p)
        outputs.update(zip(projected, results, strict=True))
    # Of no global token too the result depends on `query`, so that it gets a gradient.
    return torch.cat([queries[:0].flatten(1), *(outputs[index] for index in sorted(outputs))])


def form_costs(num_rows: int, num_tokens: int, num_heads: int, d: int) -> tuple[int, int]:
    """Return the flops, forward, of rows against one document: projected and absorbed."""
    projected = 4 * d * num_tokens * (d + num_rows)
    absorbed = 4 * d * num_rows * (num_heads * num_tokens + d)
    return projected, absorbed


def is_cheaper_absorbed(num_rows: int, num_tokens: int, num_heads: int, d: int) -> bool:
    """Tell which form "auto" is, for rows against one document."""
    projected, absorbed = form_costs(num_rows, num_tokens, num_heads, d)
    return absorbed <= projected


@dataclass(frozen=True)
class _Document:
    """The scaled global queries [g, H, D] of one document and its states [n, d]."""

    queries: Tensor
    states: Tensor
    is_valid: Tensor | None
    dropout_p: float

    @property
    def is_cheaper_absorbed(self) -> bool:
        (g, num_heads, _), (n, d) = self.queries.shape, self.states.shape
        return g > 0 and is_cheaper_absorbed(g, n, num_heads, d)

    def weights(self, scores: Tensor) -> Tensor:
        """Return the softmax over the document's valid tokens, the last dimension, dropped out."""
        if self.is_valid is not None:
            scores = scores.masked_fill(~self.is_valid, -torch.inf)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return dropout(scores.softmax(-1, dtype=wide).to(scores.dtype), self.dropout_p, True)


def _part(flags: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if flags is None else flags[start:end]


def are_plain(key: nn.Module, value: nn.Module, *, required: bool) -> bool:
    """Tell whether the absorbed form is possible; raise ConfigError if not and it is `required`."""
    plain = is_plain_linear(key) and is_plain_linear(value)
    if required and not plain:
        raise ConfigError(
            f"the absorbed form needs plain nn.Linear projections, not {type(key).__name__} and "
            f"{type(value).__name__}; leave the form to 'auto'"
        )
    return plain


def _projected(document: _Document, key: nn.Module, value: nn.Module) -> Tensor:
    g, num_heads, head_dim = document.queries.shape
    keys, values = (
        module(document.states).view(-1, num_heads, head_dim).transpose(0, 1)
        for module in (key, value)
    )
    scores = document.queries.transpose(0, 1) @ keys.transpose(1, 2)
    out: Tensor = document.weights(scores) @ values
    return out.transpose(0, 1).reshape(g, -1)


def _projected_by_kernel(
    queries: Tensor,
    states: Tensor,
    layout: Layout,
    documents: list[int],
    key: nn.Module,
    value: nn.Module,
    dropout_p: float,
) -> Sequence[Tensor]:
    """Return the rows of each of these documents, all in one call."""
    # Here and not above: everything else runs without Triton.
    from longformer_core.attention.fused.few_queries import fused_rows

    def plan() -> tuple[Segments, Tensor | None]:
        lengths = [layout.lengths[document] for document in documents]
        flags = layout.is_valid
        return (
            Segments.packed(counts, lengths, states.device),
            None if flags is None else _slots_of(flags, layout.cu_seqlens, documents),
        )

    counts = [layout.num_globals[document] for document in documents]
    segments, is_valid = layout.plan(("fused rows", *documents), plan)
    tokens = _slots_of(states, layout.cu_seqlens, documents)
    keys, values = (
        torch.unflatten(module(tokens), -1, queries.shape[1:]).transpose(0, 1)[None]
        for module in (key, value)
    )
    rows = _slots_of(queries, list(accumulate(layout.num_globals, initial=0)), documents)
    out = fused_rows(rows, keys, values, segments, scale=1.0, valid=is_valid, dropout_p=dropout_p)
    return torch.split(out.flatten(1), counts)


def _slots_of(x: Tensor, starts: Sequence[int], documents: Sequence[int]) -> Tensor:
    """Return what some of the documents have of x; a view where they lie together."""
    runs: list[tuple[int, int]] = []
    for document in documents:
        start, end = starts[document], starts[document + 1]
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, end))
    parts = [x[start:end] for start, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _absorbed(documents: list[_Document], key: nn.Module, value: nn.Module) -> Sequence[Tensor]:
    """Return the rows of each document; the weights are read once for all of them."""
    assert isinstance(key, nn.Linear)
    assert isinstance(value, nn.Linear)
    counts = [len(document.queries) for document in documents]
    queries = torch.cat([document.queries for document in documents]).transpose(0, 1)
    folded = torch.split(fold_into_queries(queries, key), counts, 1)
    mixed = [
        (document.weights(rows.flatten(0, 1) @ document.states.T) @ document.states).view_as(rows)
        for document, rows in zip(documents, folded, strict=True)
    ]
    out = fold_into_results(torch.cat(mixed, 1), value, len(queries)).transpose(0, 1).flatten(1)
    return torch.split(out if value.bias is None else out + value.bias, counts)


def fold_into_queries(queries: Tensor, key: nn.Linear) -> Tensor:
    """Return queries of the states themselves, [.., H, rows, d] of [.., H, rows, D]."""
    return queries @ key.weight.view(queries.shape[-3], queries.shape[-1], -1)


def fold_into_results(mixed: Tensor, value: nn.Linear, num_heads: int) -> Tensor:
    """Return mixed values, [.., H, rows, D] of mixed states [.., H, rows, d]; without bias."""
    return mixed @ value.weight.view(num_heads, -1, mixed.shape[-1]).transpose(1, 2)
