"""Few query rows against many keys: the encoder's global tokens and the decoder's cross-attention.

Shape letters: T packed tokens, n tokens of one document, G global tokens of the batch, g of one
document, H heads, D head dimension, d = H * D.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from longformer_core.errors import ConfigError, ShapeError
from longformer_core.layout import Layout

# Documents share a padded tensor while the shorter ones waste no more than this.
_SLACK_TOKENS = 32
_SLACK_SHARE = 8

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
) -> Tensor:
    """Let each global token attend to every valid token of its document, by its own projections.

    The projected form computes keys and values of all n tokens. The absorbed form multiplies
    `key`'s weight into the few queries and `value`'s weight into their few results, so that the
    states themselves are keys and values; `key`'s bias adds one constant per row, which the softmax
    cancels. Equal up to rounding; "auto" takes the cheaper one for each document, and the projected
    one whenever `key` or `value` is more than a plain `nn.Linear` (see `is_plain_linear`). With
    `dropout_p` each probability is dropped with that chance and the others scaled to make up.
    Shapes: states [T, d]; returns [G, d], in the order of `layout.global_index`.
    Numerics: softmax in float32 (float64 for float64 inputs).
    Raises: ConfigError when "absorbed" is asked for and `key` or `value` is not plain.
    """
    d = states.shape[-1]
    queries = query(states.index_select(0, layout.global_index))
    queries = queries.view(-1, num_heads, d // num_heads) / math.sqrt(d // num_heads)
    if torch.compiler.is_compiling() and _are_plain(key, value, required=False):
        weights = (key.weight, key.bias, value.weight, value.bias)
        out: Tensor = _rows_in_a_graph(queries, states, *weights, layout.number, form)
        return out
    return _rows(queries, states, layout, key, value, form, dropout_p)


@torch.library.custom_op("longhaul::global_attention", mutates_args=())
def _rows_in_a_graph(
    queries: Tensor,
    states: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    layout: int,
    form: str,
) -> Tensor:
    """Compute `_rows` as one node of a compiled graph, whatever the documents; not in training."""
    key, value = _linear(key_weight, key_bias), _linear(value_weight, value_bias)
    return _rows(queries, states, Layout.of_number(layout), key, value, form, 0.0)


@_rows_in_a_graph.register_fake
def _(queries: Tensor, *_: object) -> Tensor:
    return queries.new_empty(len(queries), queries.shape[1] * queries.shape[2])


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.device("meta"):
        module = nn.Linear(weight.shape[1], weight.shape[0])
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
    if absorbed and _are_plain(key, value, required=form == "absorbed"):
        results = _absorbed([documents[index] for index in absorbed], key, value)
        outputs.update(zip(absorbed, results, strict=True))
    for index, document in enumerate(documents):
        if index not in outputs and len(document.queries):
            outputs[index] = _projected(document, key, value)
    # Of no global token too the result depends on `query`, so that it gets a gradient.
    return torch.cat([queries[:0].flatten(1), *(outputs[index] for index in sorted(outputs))])


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
        return 0 < g * (num_heads * n + d) <= n * (d + g)

    def weights(self, scores: Tensor) -> Tensor:
        """Return the softmax over the document's valid tokens, the last dimension, dropped out."""
        if self.is_valid is not None:
            scores = scores.masked_fill(~self.is_valid, -torch.inf)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return dropout(scores.softmax(-1, dtype=wide).to(scores.dtype), self.dropout_p)


def _part(flags: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if flags is None else flags[start:end]


def _are_plain(key: nn.Module, value: nn.Module, *, required: bool) -> bool:
    plain = is_plain_linear(key) and is_plain_linear(value)
    if required and not plain:
        raise ConfigError(
            f"the absorbed form needs plain nn.Linear projections, not {type(key).__name__} and "
            f"{type(value).__name__}; leave the form to 'auto'"
        )
    return plain


def is_plain_linear(module: nn.Module) -> bool:
    """Tell whether a module is exactly `x W^T + b` with a local weight, so W may be used alone.

    False for subclasses, parametrizations, hooks, wrapped, quantized or sharded weights.
    """
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def _projected(document: _Document, key: nn.Module, value: nn.Module) -> Tensor:
    g, num_heads, head_dim = document.queries.shape
    keys, values = (
        module(document.states).view(-1, num_heads, head_dim).transpose(0, 1)
        for module in (key, value)
    )
    scores = document.queries.transpose(0, 1) @ keys.transpose(1, 2)
    out: Tensor = document.weights(scores) @ values
    return out.transpose(0, 1).reshape(g, -1)


def _absorbed(documents: list[_Document], key: nn.Module, value: nn.Module) -> Sequence[Tensor]:
    """Return the rows of each document; the weights are read once for all of them."""
    assert isinstance(key, nn.Linear)
    assert isinstance(value, nn.Linear)
    counts = [len(document.queries) for document in documents]
    queries = torch.cat([document.queries for document in documents])
    num_heads, head_dim = queries.shape[1:]
    key_weight, value_weight = (
        module.weight.view(num_heads, head_dim, -1) for module in (key, value)
    )
    folded = torch.split(torch.einsum("ghe,hed->ghd", queries, key_weight), counts)
    mixed = [
        (document.weights(rows.flatten(0, 1) @ document.states.T) @ document.states)
        for document, rows in zip(documents, folded, strict=True)
    ]
    sums = torch.cat(mixed).view(len(queries), num_heads, -1)
    out = torch.einsum("ghd,hed->ghe", sums, value_weight).flatten(1)
    return torch.split(out if value.bias is None else out + value.bias, counts)


class Source:
    """The keys and values that a decoder's cross-attention reads, each document once.

    Documents of similar length share one padded tensor, so that many short ones cost one call;
    long ones stand alone, unpadded. The rows that read a document (its beams) are query rows
    against its one copy. Tokens that the decoder may not see are left out, for cross-attention
    knows no distances; a document without any gives zeros.
    """

    def __init__(
        self,
        states: Tensor,
        layout: Layout,
        projections: Sequence[tuple[nn.Module, nn.Module]],
        num_heads: int,
    ) -> None:
        """Project `states` [T, d] by the (key, value) modules of each layer."""
        starts = layout.cu_seqlens
        if layout.is_visible is not None:
            states = states[layout.is_visible]
            seen = [0, *layout.is_visible.cumsum(0).tolist()]
            starts = tuple(seen[start] for start in starts)
        lengths = [end - start for start, end in pairwise(starts)]
        members = _similar(lengths)
        self._layers: list[list[tuple[Tensor, Tensor]]] = []
        for key, value in projections:
            keys, values = (
                module(states).view(len(states), num_heads, states.shape[-1] // num_heads)
                for module in (key, value)
            )
            self._layers.append(
                [(_padded(keys, docs, starts), _padded(values, docs, starts)) for docs in members]
            )
        self._arrange(members, [[lengths[doc] for doc in docs] for docs in members], states)

    def _arrange(self, members: list[list[int]], lengths: list[list[int]], like: Tensor) -> None:
        """Note which documents lie where, and make the masks of the groups."""
        order = [doc for docs in members for doc in docs]
        self.num_documents = len(order)
        self._members, self._lengths, self._like = members, lengths, like[:0]
        self._biases = [_padding_bias(group, like) for group in lengths]
        self._order = self._inverse = None
        if order != sorted(order):
            self._order = torch.tensor(order, device=like.device)
            self._inverse = self._order.argsort()

    @property
    def num_bytes(self) -> int:
        """Return the memory that the keys and values take."""
        return sum(tensor.nbytes for groups in self._layers for pair in groups for tensor in pair)

    def attend(
        self, layer: int, q: Tensor, rows_per_document: int, *, dropout_p: float = 0.0
    ) -> Tensor:
        """Let each row attend to all visible tokens of its document.

        Shapes: q [R, H, D], the rows of document i from i * rows_per_document; returns [R, H * D].
        """
        if len(q) != self.num_documents * rows_per_document:
            raise ShapeError(
                f"{len(q)} rows cannot be {rows_per_document} for each of {self.num_documents} "
                "documents; keep the rows and the documents of the source in step"
            )
        q = q.view(self.num_documents, rows_per_document, *q.shape[1:]).transpose(1, 2)
        if self._order is not None:
            q = q.index_select(0, self._order)
        outputs, first = [], 0
        for (keys, values), bias in zip(self._layers[layer], self._biases, strict=True):
            rows = q[first : first + len(keys)]
            first += len(keys)
            outputs.append(
                scaled_dot_product_attention(
                    rows, keys, values, attn_mask=bias, dropout_p=dropout_p
                )
            )
        out = outputs[0] if len(outputs) == 1 else torch.cat([q[:0], *outputs])
        if self._inverse is not None:
            out = out.index_select(0, self._inverse)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def select(self, document_index: Tensor) -> "Source":
        """Keep these documents, in this order, and free the memory of the others; return self."""
        chosen = document_index.tolist()
        members: list[list[int]] = []
        lengths: list[list[int]] = []
        for group, (docs, sizes) in enumerate(zip(self._members, self._lengths, strict=True)):
            slot_of = {doc: slot for slot, doc in enumerate(docs)}
            kept = [new for new, old in enumerate(chosen) if old in slot_of]
            slots = [slot_of[chosen[new]] for new in kept]
            members.append(kept)
            lengths.append([sizes[slot] for slot in slots])
            if slots != list(range(len(docs))):
                self._keep(group, slots, max(lengths[-1], default=0))
        full = [group for group, docs in enumerate(members) if docs]
        self._layers = [[groups[group] for group in full] for groups in self._layers]
        self._arrange([members[g] for g in full], [lengths[g] for g in full], self._like)
        return self

    def _keep(self, group: int, slots: list[int], length: int) -> None:
        index = torch.tensor(slots, dtype=torch.int64, device=self._like.device)
        for groups in self._layers:
            keys, values = groups[group]
            groups[group] = (
                keys[:, :, :length].index_select(0, index),
                values[:, :, :length].index_select(0, index),
            )


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Group documents so that padding each to the longest of its group adds little."""
    groups: list[list[int]] = []
    room = -1
    for doc in sorted(range(len(lengths)), key=lambda doc: -lengths[doc]):
        if groups and room - lengths[doc] <= max(_SLACK_TOKENS, room // _SLACK_SHARE):
            groups[-1].append(doc)
        else:
            groups.append([doc])
            room = lengths[doc]
    return [sorted(docs) for docs in groups]


def _padded(packed: Tensor, docs: list[int], starts: Sequence[int]) -> Tensor:
    """Return [documents, H, n, D] of packed [T, H, D], with zeros after a document's end."""
    length = max(starts[doc + 1] - starts[doc] for doc in docs)
    out = packed.new_zeros(len(docs), packed.shape[1], length, packed.shape[2])
    for slot, doc in enumerate(docs):
        tokens = packed[starts[doc] : starts[doc + 1]]
        out[slot, :, : len(tokens)] = tokens.transpose(0, 1)
    return out


def _padding_bias(lengths: list[int], like: Tensor) -> Tensor | None:
    """Return the additive mask [documents, 1, 1, n] of one group, None when nothing is padded.

    A document without tokens is left unmasked: its values are zeros, and a row that sees nothing
    would be NaN.
    """
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    sizes = torch.tensor([length or longest for length in lengths])
    is_padding = torch.arange(longest)[None] >= sizes[:, None]
    bias = torch.zeros(is_padding.shape, dtype=like.dtype).masked_fill(is_padding, -torch.inf)
    return bias[:, None, None].to(like.device)
