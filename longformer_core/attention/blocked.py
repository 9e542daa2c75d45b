"""Window attention in blocks of queries, in plain PyTorch: any device, memory linear in tokens.

A block is C consecutive queries of one document. Its keys are the W tokens within `radius` of any
of them, as a view, and the document's global tokens as extra columns. Only two corners of the band
need a mask, each a triangle that all blocks share; a global column is masked for the queries that
have the token in their band already, so that it counts once.

With a dilation r the band of a token holds tokens of its own residue class only, those r apart: the
classes of a document, brought in order one after another, are documents of their own to the band,
and share the document's global columns. Heads of equal dilation are computed together.
Shape letters: T packed tokens, H heads, D head dimension, C, W as above, g globals of the document.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import register_flop_formula

from longformer_core.attention.band import Band
from longformer_core.dropout import draw_kept
from longformer_core.layout import Layout

# Queries of a block. Few keep the keys that no query of the block sees few; many keep the matrices
# large. Documents up to _WHOLE tokens are one block.
_BLOCK = {"cpu": 128}
_BLOCK_ELSEWHERE = 512
_WHOLE = 256
# Score rows are padded to this many columns when global columns make their length odd.
_ALIGN = 16
# Up to this radius the inner blocks of a document are smaller and computed many at once, head by
# head, as many as have scores of these bytes in float32.
_JOINED_RADIUS = 128
_JOINED_BLOCK = 32
_JOINED_BYTES = 2**23


@dataclass(frozen=True)
class _Block:
    """Places of a block's queries and keys, and its document's range in `_Strand.global_index`.

    `masks_globals`: some query may not see some global column, or sees it in its band already.
    With a `count`, that many blocks one after another, of which each has `num_queries` queries and
    `num_keys` keys, all alike.
    """

    queries: slice
    keys: slice
    globals: slice
    num_queries: int
    num_keys: int
    num_globals: int
    masks_globals: bool
    count: int = 1


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    band: Band,
    scale: float,
    dropout: tuple[float, int] = (0.0, 0),
    *,
    needs_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute `window_attention` block by block, and its gradients block by block again.

    The backward pass computes the probabilities anew, so nothing of size tokens x window is kept.
    Numerics: softmax in float32 for narrower inputs.
    """
    # One operator, not many: torch.compile and torch.export see a single node of known shape.
    dtype = q.dtype
    if dropout[0]:
        # Only the explicit form, in 32 bits, can drop the same probabilities again going back.
        wide = torch.promote_types(dtype, torch.float32)
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    given = (layout.number, band.radius, band.dilations, band.is_causal, scale, *dropout)
    out, lse = _attend(q, k, v, *given, needs_lse)
    return out.to(dtype), lse.detach()


@torch.library.custom_op("longhaul::blocked_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: int,
    radius: int,
    dilations: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: int,
    needs_lse: bool,
) -> tuple[Tensor, Tensor]:
    calls = _calls(layout, radius, dilations, is_causal, scale, dropout_p, seed)
    results = [_forward(call, *map(call.pick, (q, k, v)), needs_lse=needs_lse) for call in calls]
    out = _whole(calls, [rows for rows, _ in results])
    is_valid = calls[0].layout.is_valid
    if not needs_lse:
        return _without_invalid(out, is_valid, 0.0), _no_lse(q)
    lse = _whole(calls, [sums for _, sums in results])
    return _without_invalid(out, is_valid, 0.0), _without_invalid(lse, is_valid, -torch.inf)[..., 0]


def _no_lse(q: Tensor, num_tokens: int = 0) -> Tensor:
    return q.new_empty(num_tokens, q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("longhaul::blocked_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    layout: int,
    radius: int,
    dilations: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    calls = _calls(layout, radius, dilations, is_causal, scale, dropout_p, seed)
    grad = _without_invalid(grad, calls[0].layout.is_valid, 0.0)
    results = [_backward(call, *map(call.pick, (q, k, v, grad, out))) for call in calls]
    dq, dk, dv = (_whole(calls, list(parts)) for parts in zip(*results, strict=True))
    return dq, dk, dv


@_attend.register_fake
def _(q: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, _no_lse(q, len(q) if given[-1] else 0)


@_attend_backward.register_fake
def _(_: Tensor, *qkv: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv[:3])
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[0])
    ctx.given = inputs[3:-1]
    # Numbers do not keep a layout alive, and the backward pass asks for it again.
    ctx.layout = Layout.of_number(inputs[3])


def _turn(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _attend_backward(grad, *ctx.saved_tensors, *ctx.given)
    return *gradients, *(None for _ in ctx.given), None


_attend.register_autograd(_turn, setup_context=_save)


def _forward(
    call: "_Call", q: Tensor, k: Tensor, v: Tensor, *, needs_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the rows [T, h, D] of one call, and their lse [T, h, 1] if asked for."""
    if call.dropout[0] or (q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)):
        lse = q.new_empty(*q.shape[:2], 1) if needs_lse else None
        return _explicit(q, k, v, call, lse), lse
    return _fused(q, k, v, call), _log_sums(q, k, call) if needs_lse else None


def _backward(
    call: "_Call", q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.dtype == wide:
        return _gradients(q, k, v, grad, out, call)
    # In 32 bits: many blocks add to the gradient of one key, most of all of a global one. The
    # output is rounded, so it is of no use.
    parts = _gradients(q.to(wide), k.to(wide), v.to(wide), grad.to(wide), None, call)
    dq, dk, dv = (part.to(q.dtype) for part in parts)
    return dq, dk, dv


@dataclass(frozen=True)
class _Strand:
    """The packed tokens in an order in which the band of one dilation has no gaps.

    A run is what is one document to the band: the slots `first`, `first + step`, and so on.
    Shapes: order [T] has the slot at each place, None when that is the place itself; global_index
        [G] places, in the layout's order of global tokens; is_valid [T] by place.
    """

    runs: tuple["_Run", ...]
    order: Tensor | None
    global_index: Tensor
    is_valid: Tensor | None

    @classmethod
    def of(cls, layout: Layout, dilation: int) -> "_Strand":
        runs = tuple(_runs(layout, dilation))
        if dilation == 1:
            return cls(runs, None, layout.global_index, layout.is_valid)
        device = layout.device
        order = torch.cat([torch.arange(0), *map(_slots, runs)]).to(device)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=device)
        is_valid = None if layout.is_valid is None else layout.is_valid[order]
        return cls(runs, order, places[layout.global_index], is_valid)


def _slots(run: "_Run") -> Tensor:
    return torch.arange(run.slots.start, run.slots.stop, run.slots.step)


@dataclass(frozen=True)
class _Run:
    """The places of one run, its slots, its document's globals and their range among all."""

    start: int
    slots: range
    globals: tuple[int, ...]
    columns: slice

    @property
    def end(self) -> int:
        return self.start + len(self.slots)

    @property
    def global_places(self) -> list[int]:
        """Return the places of the globals that lie in the run."""
        return [self.start + self.slots.index(slot) for slot in self.globals if slot in self.slots]


def _runs(layout: Layout, dilation: int) -> Iterator[_Run]:
    place = 0
    global_ends = accumulate(layout.num_globals)
    for (start, end), positions, global_end in zip(
        pairwise(layout.cu_seqlens), layout.global_positions, global_ends, strict=True
    ):
        columns = slice(global_end - len(positions), global_end)
        chosen = tuple(start + position for position in positions)
        for first in range(start, min(start + dilation, end)):
            run = _Run(place, range(first, end, dilation), chosen, columns)
            yield run
            place = run.end


@dataclass(frozen=True)
class _Call:
    """What is computed for the heads of one dilation, beside its tensors.

    `dropout` is a probability and a seed; `heads` is None when all have the dilation.
    """

    layout: Layout
    radius: int
    dilation: int
    heads: tuple[int, ...] | None
    num_heads: int
    is_causal: bool
    scale: float
    dropout: tuple[float, int]

    @property
    def ahead(self) -> int:
        """Return how many keys after itself a query sees in its band."""
        return 0 if self.is_causal else self.radius

    @property
    def strand(self) -> _Strand:
        """Return the order of tokens that all layers with this dilation share."""
        layout, dilation = self.layout, self.dilation
        return layout.plan(("strand", dilation), lambda: _Strand.of(layout, dilation))

    @property
    def blocks(self) -> list[_Block]:
        """Return the plan that all layers with this band share."""
        size = _BLOCK.get(self.layout.device.type, _BLOCK_ELSEWHERE)
        return self._plan("blocks", lambda: _blocks(self, size))

    @property
    def forward_blocks(self) -> list[_Block]:
        """Return the plan of a forward pass: without dropout small blocks are joined, on CPUs.

        With it the backward pass has to drop the same again, and goes block by block.
        """
        if self.radius > _JOINED_RADIUS or self.dropout[0] or self.layout.device.type != "cpu":
            return self.blocks
        return self._plan("joined", lambda: _joined(_blocks(self, _JOINED_BLOCK), self))

    def _plan(self, name: str, build: Callable[[], Iterable[_Block]]) -> list[_Block]:
        key = (name, self.radius, self.dilation, self.is_causal)
        return self.layout.plan(key, lambda: list(build()))

    def pick(self, x: Tensor) -> Tensor:
        """Return the call's heads of [T, H, D], tokens by place; no copy where it is all of it."""
        order = self.strand.order
        x = x if self.heads is None else x[:, list(self.heads)]
        return x if order is None else x[order]

    def put(self, part: Tensor, out: Tensor) -> None:
        """Write what belongs to the call's heads, tokens by place, where `pick` took it from."""
        order = self.strand.order
        if self.heads is None:
            out[order] = part
        elif order is None:
            out[:, list(self.heads)] = part
        else:
            out[order[:, None], torch.tensor(self.heads, device=order.device)] = part


def _calls(
    layout: int,
    radius: int,
    dilations: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: int,
) -> list[_Call]:
    """Return the calls that together are the operation: one for each dilation."""
    calls = []
    of_number = Layout.of_number(layout)
    for index, dilation in enumerate(sorted(set(dilations))):
        heads = tuple(head for head, own in enumerate(dilations) if own == dilation)
        # Blocks take the seeds from this one on; see `_Scores.kept`.
        dropout = (dropout_p, seed + index * of_number.num_tokens)
        some = None if len(heads) == len(dilations) else heads
        call = _Call(of_number, radius, dilation, some, len(heads), is_causal, scale, dropout)
        calls.append(call)
    return calls


def _whole(calls: list[_Call], parts: Sequence[Tensor | None]) -> Tensor:
    """Return the calls' parts [T, h, D] as one tensor [T, H, D], tokens by slot."""
    first = parts[0]
    assert first is not None
    if calls[0].heads is None and calls[0].strand.order is None:
        return first
    num_heads = sum(call.num_heads for call in calls)
    out = first.new_empty(first.shape[0], num_heads, first.shape[2])
    for call, part in zip(calls, parts, strict=True):
        assert part is not None
        call.put(part, out)
    return out


def _product_flops(shape: Sequence[int], blocks: Iterable[_Block], num_heads: int) -> int:
    """Return the flops of one product of all blocks' queries and keys, for torch's counter."""
    pairs = sum(b.count * b.num_queries * (b.num_keys + b.num_globals) for b in blocks)
    return 2 * pairs * num_heads * shape[2]


@register_flop_formula(torch.ops.longhaul.blocked_attention)
def _(q: Sequence[int], *given: Any, **_: Any) -> int:
    calls = _calls(*given[2:-1])
    return 2 * sum(_product_flops(q, call.forward_blocks, call.num_heads) for call in calls)


@register_flop_formula(torch.ops.longhaul.blocked_attention_backward)
def _(_grad: Any, q: Sequence[int], *given: Any, **_: Any) -> int:
    calls = _calls(*given[3:])
    return 5 * sum(_product_flops(q, call.blocks, call.num_heads) for call in calls)


def _without_invalid(rows: Tensor, is_valid: Tensor | None, value: float) -> Tensor:
    if is_valid is None:
        return rows
    return rows.masked_fill(~is_valid[:, None, None], value)


def _blocks(call: _Call, size: int) -> Iterator[_Block]:
    for run in call.strand.runs:
        places = run.global_places
        step = len(run.slots) if len(run.slots) <= _WHOLE else size
        for first in range(run.start, run.end, max(step, 1)):
            last = min(first + step, run.end)
            low, high = max(run.start, first - call.radius), min(run.end, last + call.ahead)
            in_band = any(low <= place < high for place in places)
            # A causal query does not see the globals after it; the first one has the most of them.
            lies_after = call.is_causal and run.globals[-1:] > (run.slots[first - run.start],)
            yield _Block(
                queries=slice(first, last),
                keys=slice(low, high),
                globals=run.columns,
                num_queries=last - first,
                num_keys=high - low,
                num_globals=len(run.globals),
                masks_globals=in_band or lies_after,
            )


def _joined(blocks: Iterable[_Block], call: _Call) -> Iterator[_Block]:
    """Join the blocks that see their whole window and follow one another in a run."""
    run: list[_Block] = []
    for block in blocks:
        first, last = block.queries.start - call.radius, block.queries.stop + call.ahead
        is_inner = (block.keys.start, block.keys.stop) == (first, last)
        is_inner &= block.num_queries == _JOINED_BLOCK
        # Their products take whole rows of scores; see `_Scores.product`.
        is_inner &= block.keys.start + _row_length(block) <= call.layout.num_tokens
        follows = run and run[-1].globals == block.globals and len(run) < _most(block)
        if run and not (is_inner and follows):
            yield _join(run)
            run = []
        if is_inner:
            run.append(block)
        else:
            yield block
    if run:
        yield _join(run)


def _most(block: _Block) -> int:
    """Return how many blocks are joined at the most."""
    return max(1, _JOINED_BYTES // (4 * block.num_queries * _row_length(block)))


def _join(run: list[_Block]) -> _Block:
    return replace(
        run[0],
        queries=slice(run[0].queries.start, run[-1].queries.stop),
        keys=slice(run[0].keys.start, run[-1].keys.stop),
        masks_globals=any(block.masks_globals for block in run),
        count=len(run),
    )


@dataclass(frozen=True)
class _Part:
    """What one batched product takes: a block in all heads, or joined blocks in one head."""

    block: _Block
    head: int | None

    def rows(self, x: Tensor) -> Tensor:
        """Return the queries' part [B, C, D] of [T, H, D]."""
        rows = x[self.block.queries]
        if self.head is None:
            return rows.transpose(0, 1)
        return rows[:, self.head].view(self.block.count, -1, x.shape[2])

    def keys(self, x: Tensor, width: int) -> Tensor:
        """Return `width` tokens [B, width, D] from the first key on, or as many as there are."""
        first, step = self.block.keys.start, self.block.num_queries
        if self.head is None:
            return x[first : first + width].transpose(0, 1)
        last = first + (self.block.count - 1) * step + width
        return x[first:last, self.head].unfold(0, width, step).transpose(1, 2)

    def columns(self, x: Tensor) -> Tensor:
        """Return the global tokens' part [B, g, D] of [G, H, D]."""
        columns = x[self.block.globals]
        if self.head is None:
            return columns.transpose(0, 1)
        return columns[:, self.head].expand(self.block.count, -1, -1)

    def put(self, rows: Tensor, out: Tensor) -> None:
        """Write rows [B, C, D] to their places in [T, H, D]."""
        if self.head is None:
            out[self.block.queries] = rows.transpose(0, 1)
        else:
            out[self.block.queries, self.head] = rows.flatten(0, 1)


def _parts(blocks: Iterable[_Block], num_heads: int) -> Iterator[_Part]:
    for block in blocks:
        heads: Iterable[int | None] = [None] if block.count == 1 else range(num_heads)
        for head in heads:
            yield _Part(block, head)


class _Masks:
    """Additive masks of one call; everything that does not depend on a block is made once."""

    def __init__(self, call: _Call, like: Tensor) -> None:
        self._call = call
        self._strand = call.strand
        size = max(_BLOCK.get(like.device.type, _BLOCK_ELSEWHERE), _WHOLE)
        self.before, self.after = call.layout.plan(
            ("triangles", like.dtype), lambda: _triangles(size, like)
        )
        self.keys = None
        is_valid = self._strand.is_valid
        if is_valid is not None:
            # Finite, so that an invalid query among invalid keys is a number and not NaN; its row
            # is set to zero at the end. Half the range leaves room to add a score.
            low = torch.finfo(like.dtype).min / 2
            self.keys = torch.zeros_like(is_valid, dtype=like.dtype).masked_fill_(~is_valid, low)

    def add(self, scores: Tensor, block: _Block) -> None:
        """Mask scores [..., C, W + g], keys first, in place."""
        c, w = block.num_queries, block.num_keys
        # Query y sees key x from x = y - skip on.
        skip = self._call.radius - (block.queries.start - block.keys.start)
        left = c - 1 - skip
        if left > 0:
            scores[..., skip:, :left].add_(self.before[: c - skip, :left])
        right = block.keys.start + w - (block.queries.start + self._call.ahead + 1)
        if right > 0:
            scores[..., w - right : w].add_(self.after[:c, :right])
        if self.keys is not None:
            scores[..., :w].add_(self.keys[block.keys].unfold(0, w, c)[:, None])
        if block.masks_globals:
            columns = scores[..., w : w + block.num_globals]
            columns.masked_fill_(
                self._hidden_globals(block).view(-1, c, block.num_globals), -torch.inf
            )

    def _hidden_globals(self, block: _Block) -> Tensor:
        """Return [count * C, g]: the query has the global in its band, or it lies ahead of it."""
        call, order = self._call, self._strand.order
        columns = self._strand.global_index[block.globals]
        queries = torch.arange(block.queries.start, block.queries.stop, device=columns.device)
        distance = queries[:, None] - columns
        # Places of other runs may be near and are other residue classes.
        is_own = (columns >= block.keys.start) & (columns < block.keys.stop)
        hidden: Tensor = (distance <= call.radius) & (distance >= -call.ahead) & is_own
        if not call.is_causal:
            return hidden
        if order is not None:
            distance = order[queries][:, None] - order[columns]
        return hidden.logical_or_(distance < 0)


def _triangles(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return two masks [size, size]: one hides x < y, the other x >= y (row y, column x)."""
    hidden = like.new_full((size, size), -torch.inf)
    return hidden.tril(-1), hidden.triu()


class _Scores:
    """The probabilities of one part after another, in buffers that all parts share.

    The explicit form: two products around a softmax, the fastest on CPUs.
    """

    def __init__(self, q: Tensor, k: Tensor, call: _Call, blocks: list[_Block]) -> None:
        """Pick the global tokens' keys."""
        self.q, self.k, self._call = q, k, call
        self.k_global = k[call.strand.global_index]
        self._columns = self.k_global * call.scale
        self._masks = _Masks(call, q)
        self._size = max((math.prod(self._shape(block)) for block in blocks), default=0)
        self._buffers: dict[str, Tensor] = {}
        self._tails: dict[tuple[object, ...], Tensor] = {}

    def _shape(self, block: _Block) -> tuple[int, int, int]:
        """Return [B, C, W + g and some]."""
        batch = block.count if block.count > 1 else self.q.shape[1]
        return batch, block.num_queries, _row_length(block)

    def _buffer(self, name: str, block: _Block) -> Tensor:
        """Return [B, C, W + g and some], with what is left of the last part of that name."""
        if name not in self._buffers:
            self._buffers[name] = self.q.new_empty(self._size)
        shape = self._shape(block)
        return self._buffers[name][: math.prod(shape)].view(shape)

    def product(
        self,
        name: str,
        part: _Part,
        rows: Tensor,
        keys: Tensor,
        columns: Tensor,
        *,
        scale: float = 1.0,
        rest: float = 0.0,
    ) -> Tensor:
        """Return `scale` times rows times keys, then rows times columns, then the `rest`.

        A batched product into a part of a row is slow, so this one takes the tokens after the
        block's keys too, where there are some, and overwrites what comes of them.
        Shapes: rows and keys [T, H, D]; columns [G, H, D].
        """
        block, queries = part.block, part.rows(rows)
        out, w, g = self._buffer(name, block), block.num_keys, block.num_globals
        seen = part.keys(keys, out.shape[-1]).transpose(1, 2)
        whole = out if seen.shape[-1] == out.shape[-1] else out[..., : seen.shape[-1]]
        whole.baddbmm_(queries, seen, beta=0, alpha=scale)
        if g:
            tail = self._tail(name, block, rest)
            tail[..., :g] = torch.bmm(queries, part.columns(columns).transpose(1, 2))
            out[..., w:] = tail
        return out

    def _tail(self, name: str, block: _Block, rest: float) -> Tensor:
        """Return [B, C, g and some] for the columns of the globals, the others `rest`."""
        batch, num_queries, length = self._shape(block)
        shape = (batch, num_queries, length - block.num_keys)
        key = (name, shape, block.num_globals)
        if key not in self._tails:
            self._tails[key] = self.q.new_full(shape, rest)
        return self._tails[key]

    def probabilities(self, part: _Part, lse: Tensor | None = None) -> Tensor:
        """Return the softmax of a part's scores; their lse goes to its places in [T, h, 1]."""
        inputs, scale = (self.q, self.k, self._columns), self._call.scale
        scores = self.product("p", part, *inputs, scale=scale, rest=-torch.inf)
        self._masks.add(scores, part.block)
        if lse is None:
            return torch.softmax(scores, -1, out=scores)
        peak = scores.amax(-1, keepdim=True)
        torch.softmax(scores, -1, out=scores)
        # The largest probability is exp(peak - lse).
        part.put(peak - scores.amax(-1, keepdim=True).log(), lse)
        return scores

    def kept(self, part: _Part) -> Tensor | None:
        """Return 0 where dropout strikes and 1 / (1 - p) elsewhere: the same on every call."""
        p, seed = self._call.dropout
        if not p:
            return None
        draw = torch.Generator(self.q.device).manual_seed(seed + part.block.queries.start)
        return draw_kept(self._buffer("kept", part.block), p, draw)


def _explicit(q: Tensor, k: Tensor, v: Tensor, call: _Call, lse: Tensor | None) -> Tensor:
    blocks = call.forward_blocks
    scores, v_global = _Scores(q, k, call, blocks), v[call.strand.global_index]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for part in _parts(blocks, q.shape[1]):
        p, w, g = scores.probabilities(part, lse), part.block.num_keys, part.block.num_globals
        kept = scores.kept(part)
        if kept is not None:
            p *= kept
        mixed = torch.bmm(p[..., :w], part.keys(v, w))
        if g:
            mixed.baddbmm_(p[..., w : w + g], part.columns(v_global))
        part.put(mixed, out)
    return out


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor | None, call: _Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, given that of the output; `out` saves work if exact.

    Source: FlashAttention, arXiv:2205.14135, appendix B.
    """
    scores = _Scores(q, k, call, call.blocks)
    chosen = call.strand.global_index
    v_global = v[chosen]
    # Each row of probabilities times its own gradients, summed: what the softmax takes off.
    taken = None if out is None else (out * grad).sum(-1).t()[..., None].contiguous()
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    dk_global, dv_global = torch.zeros_like(scores.k_global), torch.zeros_like(v_global)
    for part in _parts(call.blocks, q.shape[1]):
        block, queries, rows = part.block, part.rows(q), part.rows(grad)
        w, columns = block.num_keys, slice(block.num_keys, block.num_keys + block.num_globals)
        p, kept = scores.probabilities(part), scores.kept(part)
        ds = scores.product("ds", part, grad, v, v_global)
        mixed = p
        if kept is not None:
            ds *= kept
            mixed = kept.mul_(p)
        part.keys(dv, w).baddbmm_(mixed[..., :w].transpose(1, 2), rows)
        off = torch.linalg.vecdot(ds, p)[..., None] if taken is None else taken[:, block.queries]
        ds.sub_(off).mul_(p)
        part.keys(dk, w).baddbmm_(ds[..., :w].transpose(1, 2), queries, alpha=call.scale)
        turned = torch.bmm(ds[..., :w], part.keys(k, w))
        if block.num_globals:
            turned.baddbmm_(ds[..., columns], part.columns(scores.k_global))
            by_column = ds[..., columns].transpose(1, 2)
            part.columns(dk_global).baddbmm_(by_column, queries, alpha=call.scale)
            part.columns(dv_global).baddbmm_(mixed[..., columns].transpose(1, 2), rows)
        part.put(turned.mul_(call.scale), dq)
    dk.index_add_(0, chosen, dk_global)
    dv.index_add_(0, chosen, dv_global)
    return dq, dk, dv


def _row_length(block: _Block) -> int:
    if not block.num_globals:
        return block.num_keys
    return -(-(block.num_keys + block.num_globals) // _ALIGN) * _ALIGN


def _fused(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
    """Call scaled_dot_product_attention per block: right in 16 bits, on any device."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    masks = _Masks(call, q)
    k_global, v_global = (x[call.strand.global_index] for x in (k, v))
    for block in call.blocks:
        part, w = _Part(block, None), block.num_keys
        keys = torch.cat([part.keys(k, w), part.columns(k_global)], 1)
        values = torch.cat([part.keys(v, w), part.columns(v_global)], 1)
        bias = q.new_zeros(1, block.num_queries, block.num_keys + block.num_globals)
        masks.add(bias, block)
        mixed = scaled_dot_product_attention(
            part.rows(q)[None], keys[None], values[None], attn_mask=bias[None], scale=call.scale
        )
        part.put(mixed[0], out)
    return out


def _log_sums(q: Tensor, k: Tensor, call: _Call) -> Tensor:
    """Return the lse [T, h, 1] of inputs of 16 bits, which `_fused` does not tell."""
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(*q.shape[:2], 1, dtype=wide)
    scores = _Scores(q.to(wide), k.to(wide), call, call.forward_blocks)
    for part in _parts(call.forward_blocks, q.shape[1]):
        scores.probabilities(part, lse)
    return lse
