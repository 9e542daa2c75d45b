"""What a decoder's cross-attention reads: each document once, whatever its beams.

Both forms of `global_attention.py`: keys and values of every layer, or the encoder's states alone,
which all layers share and whose weights are multiplied into queries and results. The first one is
read by the kernels of `few_queries.py` on GPUs and of `ops/cpu/decode.py` on CPUs, where they run.
Shape letters: T packed tokens, n tokens of the longest document of a group, B documents of it, b
rows (beams, or tokens of a target) per document, R rows of all documents, H heads, D head
dimension, d = H * D.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from longformer_core.attention.dispatch import Implementation, choose
from longformer_core.attention.fused.segments import Segments
from longformer_core.attention.global_attention import (
    Form,
    are_plain,
    fold_into_queries,
    fold_into_results,
    is_cheaper_absorbed,
)
from longformer_core.errors import ShapeError
from longformer_core.layout import Layout
from longformer_core.ops.compaction import compacted
from longformer_core.ops.cpu import decode

# Documents share a padded tensor while the shorter ones waste no more than this.
_SLACK_TOKENS = 32
_SLACK_SHARE = 8

Projections = Sequence[tuple[nn.Module, nn.Module]]


class CrossAttentionCache:
    """The documents that a decoder's rows attend to, by the (key, value) modules of each layer.

    Documents of similar length share one padded tensor, so that many short ones cost one call;
    long ones stand alone, unpadded. The rows that read a document (its beams) are query rows
    against its one copy. Tokens that the decoder may not see are left out, for cross-attention
    knows no distances; a document without any gives zeros.
    """

    def __init__(
        self,
        states: Tensor,
        layout: Layout,
        projections: Projections,
        num_heads: int,
        *,
        num_rows: int | Sequence[int] | None = None,
        form: Form = "auto",
        implementation: Implementation = "auto",
    ) -> None:
        """Hold what is needed of `states` [T, d].

        num_rows: how many rows will read each document in all, beams times steps; a number for all
            documents or one for each, None for many.
        form: "auto" is the cheaper one for each document and that many rows. The absorbed one holds
            one number where the projected one holds two per layer.
        implementation: of the projected form, as in `window_attention`; all but "fused" are one.
        Raises: ConfigError when "absorbed" is asked for and a module is not plain, and when
            "fused" is and cannot run.
        """
        head_dim = states.shape[-1] // num_heads
        is_fused = choose(implementation, states.device, states.dtype, head_dim) == "fused"
        starts = layout.cu_seqlens
        if layout.is_visible is not None:
            states = states[layout.is_visible]
            seen = [0, *layout.is_visible.cumsum(0).tolist()]
            starts = tuple(seen[start] for start in starts)
        lengths = [end - start for start, end in pairwise(starts)]
        plain = form != "projected" and all(
            are_plain(*pair, required=form == "absorbed") for pair in projections
        )
        reads = num_rows if isinstance(num_rows, Sequence) else [num_rows] * len(lengths)
        absorbed = [
            plain and (form == "absorbed" or _is_cheap(count, n, num_heads, states.shape[-1]))
            for count, n in zip(reads, lengths, strict=True)
        ]
        groups: list[_Group] = []
        for is_absorbed in (True, False):
            members = [doc for doc, flag in enumerate(absorbed) if flag == is_absorbed]
            for docs in _similar(members, lengths):
                parts = [states[starts[doc] : starts[doc + 1]] for doc in docs]
                held: _Held
                if is_absorbed:
                    held = _absorbed(parts, projections)
                else:
                    held = _projected(parts, projections, num_heads)
                sizes = [len(part) for part in parts]
                ends = _ends(sizes, states, is_fused=is_fused and not is_absorbed)
                groups.append(_Group(docs, ends, held))
        # Not a slice, which would keep all of the states.
        self._like = states.new_empty(0)
        self._arrange(groups)

    def _arrange(self, groups: list["_Group"]) -> None:
        """Note which documents lie where."""
        self._groups = groups
        order = [doc for group in groups for doc in group.documents]
        self.num_documents = len(order)
        self._order = self._inverse = None
        if order != sorted(order):
            self._order = torch.tensor(order, device=self._like.device)
            self._inverse = self._order.argsort()

    @property
    def num_bytes(self) -> int:
        """Return the memory that the documents take."""
        return sum(tensor.nbytes for group in self._groups for tensor in group.held.tensors)

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
        q = q.view(self.num_documents, rows_per_document, *q.shape[1:])
        if self._order is not None:
            q = q.index_select(0, self._order)
        outputs, first = [], 0
        for group in self._groups:
            rows = q[first : first + len(group.documents)]
            first += len(rows)
            outputs.append(group.held.attend(layer, rows, group.ends, dropout_p))
        out = outputs[0] if len(outputs) == 1 else torch.cat([q[:0], *outputs])
        if self._inverse is not None:
            out = out.index_select(0, self._inverse)
        return out.flatten(2).flatten(0, 1)

    def select(self, documents: Sequence[int]) -> "CrossAttentionCache":
        """Keep these documents, in this order; return self.

        The others' memory is free as soon as they were most of their group.
        """
        new_place = {old: new for new, old in enumerate(documents)}
        kept = (group.select(new_place, self._like) for group in self._groups)
        self._arrange([group for group in kept if group.documents])
        return self

    def extend(self, other: "CrossAttentionCache") -> None:
        """Append the documents of another source, which is not used any more."""
        first = self.num_documents
        moved = [
            replace(group, documents=[first + doc for doc in group.documents])
            for group in other._groups
        ]
        self._arrange(self._groups + moved)


@dataclass(frozen=True)
class _Ends:
    """Where the documents of a padded group end."""

    lengths: list[int]
    # For Triton's kernels, or additive [B, 1, 1, n] for torch; None when nothing is padded.
    mask: Segments | Tensor | None


class _Held(Protocol):
    """The documents of one group in one form."""

    @property
    def tensors(self) -> Sequence[Tensor]: ...

    def attend(self, layer: int, q: Tensor, ends: _Ends, dropout_p: float) -> Tensor:
        """Return [B, b, H, D] of rows q [B, b, H, D]."""
        ...

    def map(self, change: Callable[[Tensor], Tensor]) -> "_Held":
        """Return the same with each tensor, [B, ..., n, D or d], changed."""
        ...


@dataclass(frozen=True)
class _Projected:
    """Keys and values of each layer, [B, H, n, D]."""

    layers: Sequence[tuple[Tensor, Tensor]]

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [tensor for pair in self.layers for tensor in pair]

    def attend(self, layer: int, q: Tensor, ends: _Ends, dropout_p: float) -> Tensor:
        keys, values = self.layers[layer]
        if isinstance(ends.mask, Segments):
            return _by_kernel(q, keys, values, ends.mask, dropout_p)
        if not dropout_p and decode.can_attend(q, keys, values):
            return decode.attend(q, keys, values, ends.lengths)
        out = scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=ends.mask, dropout_p=dropout_p
        )
        return out.transpose(1, 2)

    def map(self, change: Callable[[Tensor], Tensor]) -> _Held:
        return _Projected([(change(keys), change(values)) for keys, values in self.layers])


@dataclass(frozen=True)
class _Absorbed:
    """The states [B, 1, n, d] themselves; has_tokens [B, 1, 1, 1] of 0.0 and 1.0."""

    states: Tensor
    has_tokens: Tensor
    projections: Projections

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [self.states]

    def attend(self, layer: int, q: Tensor, ends: _Ends, dropout_p: float) -> Tensor:
        assert not isinstance(ends.mask, Segments)
        q = q.transpose(1, 2)
        key, value = self.projections[layer]
        assert isinstance(key, nn.Linear)
        assert isinstance(value, nn.Linear)
        num_heads, _, head_dim = q.shape[1:]
        # The heads become rows: all of them read the same states.
        rows = fold_into_queries(q, key).flatten(1, 2)[:, None]
        if rows.requires_grad and key.bias is not None:
            # The softmax cancels it, and data-parallel training waits for its gradient: zeros.
            rows = rows + key.bias[:0].sum()
        mixed = scaled_dot_product_attention(
            rows,
            self.states,
            self.states,
            attn_mask=ends.mask,
            dropout_p=dropout_p,
            scale=head_dim**-0.5,
        )
        out = fold_into_results(mixed.view(*q.shape[:3], -1), value, num_heads)
        if value.bias is not None:
            out = out + self.has_tokens * value.bias.view(num_heads, 1, head_dim)
        return out.transpose(1, 2)

    def map(self, change: Callable[[Tensor], Tensor]) -> _Held:
        return _Absorbed(change(self.states), change(self.has_tokens), self.projections)


@dataclass(frozen=True)
class _Group:
    """Documents of similar length, by their places in the source."""

    documents: list[int]
    ends: _Ends
    held: _Held

    def select(self, new_place: dict[int, int], like: Tensor) -> "_Group":
        """Return the group with only the documents that have a new place."""
        leaving = [slot for slot, doc in enumerate(self.documents) if doc not in new_place]
        slots = compacted(len(self.documents), leaving)
        count = len(slots)
        documents = [new_place[self.documents[slot]] for slot in slots]
        if count == len(self.documents):
            return replace(self, documents=documents)
        lengths = [self.ends.lengths[slot] for slot in slots]
        longest = max(1, *lengths) if lengths else 1
        moves = [(new, old) for new, old in enumerate(slots) if new != old]

        def change(tensor: Tensor) -> Tensor:
            for new, old in moves:
                tensor[new] = tensor[old]
            kept = tensor[:count, :, :longest]
            is_mostly_gone = tensor.untyped_storage().nbytes() > 2 * kept.nbytes
            return kept.clone() if is_mostly_gone else kept

        ends = _ends(lengths, like, is_fused=isinstance(self.ends.mask, Segments))
        return _Group(documents, ends, self.held.map(change))


def _is_cheap(num_rows: int | None, n: int, num_heads: int, d: int) -> bool:
    return num_rows is not None and is_cheaper_absorbed(num_rows, n, num_heads, d)


def _projected(parts: list[Tensor], projections: Projections, num_heads: int) -> _Projected:
    """Compute keys and values of documents' states [tokens, d]."""
    sizes = [len(part) for part in parts]
    states = torch.cat(parts) if len(parts) > 1 else parts[0]

    def heads(module: nn.Module) -> Tensor:
        rows = torch.unflatten(module(states), -1, (num_heads, -1))
        return _padded(torch.split(rows, sizes))

    return _Projected([(heads(key), heads(value)) for key, value in projections])


def _absorbed(parts: list[Tensor], projections: Projections) -> _Absorbed:
    """Hold documents' states [tokens, d] as they are."""
    has_tokens = parts[0].new_tensor([len(part) > 0 for part in parts])
    padded = _padded([part[:, None] for part in parts])
    return _Absorbed(padded, has_tokens[:, None, None, None], projections)


def _similar(members: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Group documents so that padding each to the longest of its group adds little."""
    groups: list[list[int]] = []
    room = -1
    for doc in sorted(members, key=lambda doc: -lengths[doc]):
        if groups and room - lengths[doc] <= max(_SLACK_TOKENS, room // _SLACK_SHARE):
            groups[-1].append(doc)
        else:
            groups.append([doc])
            room = lengths[doc]
    return [sorted(docs) for docs in groups]


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Return [B, H, n, D] of documents [tokens, H, D], with zeros after a document's end.

    One slot at least, so that a row of a document without tokens has something to read.
    """
    length = max(1, *(len(part) for part in parts))
    out = parts[0].new_empty(len(parts), parts[0].shape[1], length, parts[0].shape[2])
    for slot, part in enumerate(parts):
        out[slot, :, : len(part)] = part.transpose(0, 1)
        out[slot, :, len(part) :] = 0.0
    return out


def _by_kernel(
    q: Tensor, keys: Tensor, values: Tensor, segments: Segments, dropout_p: float
) -> Tensor:
    # Here and not above: everything else runs without Triton.
    from longformer_core.attention.fused.few_queries import fused_rows

    out = fused_rows(
        q.flatten(0, 1),
        keys,
        values,
        segments,
        q.shape[1],
        scale=q.shape[-1] ** -0.5,
        dropout_p=dropout_p,
    )
    return out.view_as(q)


def _ends(lengths: list[int], like: Tensor, *, is_fused: bool) -> _Ends:
    """Say where the documents of one padded group end; made when the group changes, not by step."""
    if not lengths:
        return _Ends(lengths, None)
    if is_fused:
        return _Ends(lengths, Segments.padded(lengths, max(1, *lengths), like.device))
    return _Ends(lengths, _padding_bias(lengths, like))


def _padding_bias(lengths: list[int], like: Tensor) -> Tensor | None:
    """Return the additive mask of one group, None when nothing is padded.

    A document without tokens is left unmasked: its values are zeros, and a row that sees nothing
    would be NaN.
    """
    longest = max(1, *lengths)
    if min(lengths) == longest:
        return None
    sizes = torch.tensor([length or longest for length in lengths])
    is_padding = torch.arange(longest)[None] >= sizes[:, None]
    bias = torch.zeros(is_padding.shape, dtype=like.dtype).masked_fill(is_padding, -torch.inf)
    return bias[:, None, None].to(like.device)
