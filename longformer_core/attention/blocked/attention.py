"""Window attention in blocks of queries, in plain PyTorch: any device, memory linear in tokens.

A block is C consecutive queries of one document. Its keys are the W tokens within `radius` of any
of them, as a view, and the document's global tokens as extra columns. Only two corners of the band
need a mask, each a triangle that all blocks share; a global column is masked for the queries that
have the token in their band already, so that it counts once.

What the blocks are is in `plan.py`. On CPUs that a compiled kernel runs on, it takes the forward
pass where no gradient is wanted (`native.py`).
Shape letters: T packed tokens, H heads, D head dimension, C, W as above, g globals of the document.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import register_flop_formula

from longformer_core.attention.band import Band
from longformer_core.attention.blocked import native
from longformer_core.attention.blocked.plan import Block, Call, calls_of, most_queries, whole
from longformer_core.attention.dispatch import without_autocast
from longformer_core.layout import Layout
from longformer_core.ops.cpu.features import multiplies_bfloat16_slowly
from longformer_core.ops.custom_op import fake_of, has_no_gradient, operator
from longformer_core.ops.dropout import draw_kept


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
    given = (layout.number, band.radius, band.dilations, band.is_causal, scale, *dropout)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    # One operator, not many: torch.compile sees a single node of known shape.
    out, lse = _attend(q, k, v, *given, needs_gradient, needs_lse)
    return out, lse.detach()


@operator("blocked_attention")
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
    needs_gradient: bool,
    needs_lse: bool,
) -> tuple[Tensor, Tensor]:
    calls = calls_of(layout, radius, dilations, is_causal, scale, dropout_p, seed)
    with without_autocast(q):
        results = [
            _forward(
                call, *map(call.pick, (q, k, v)), needs_gradient=needs_gradient, needs_lse=needs_lse
            )
            for call in calls
        ]
    out = whole(calls, [rows for rows, _ in results])
    is_valid = calls[0].layout.is_valid
    if not needs_lse:
        return _without_invalid(out, is_valid, 0.0), _no_lse(q)
    lse = whole(calls, [sums for _, sums in results])
    return _without_invalid(out, is_valid, 0.0), _without_invalid(lse, is_valid, -torch.inf)[..., 0]


def _no_lse(q: Tensor, num_tokens: int = 0) -> Tensor:
    return q.new_empty(num_tokens, q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))


@operator("blocked_attention_backward")
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
    calls = calls_of(layout, radius, dilations, is_causal, scale, dropout_p, seed)
    grad = _without_invalid(grad, calls[0].layout.is_valid, 0.0)
    with without_autocast(q):
        results = [_backward(call, *map(call.pick, (q, k, v, grad, out))) for call in calls]
    dq, dk, dv = (whole(calls, list(parts)) for parts in zip(*results, strict=True))
    return dq, dk, dv


@fake_of(_attend)
def _(q: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, _no_lse(q, len(q) if given[-1] else 0)


@fake_of(_attend_backward)
def _(_: Tensor, *qkv: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv[:3])
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[0])
    ctx.given = inputs[3:-2]
    # Numbers do not keep a layout alive, and the backward pass asks for it again.
    ctx.layout = Layout.of_number(inputs[3])


def _turn(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _attend_backward(grad, *ctx.saved_tensors, *ctx.given)
    return *gradients, *(None for _ in ctx.given), None, None


torch.library.register_autograd(_attend, _turn, setup_context=_save)
has_no_gradient(_attend_backward, "attention has no second derivative")


def _forward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, *, needs_gradient: bool, needs_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the rows [T, h, D] of one call, and their lse [T, h, 1] if asked for."""
    wide = torch.promote_types(q.dtype, torch.float32)
    is_slow = q.dtype == torch.bfloat16 and q.is_cpu and multiplies_bfloat16_slowly()
    is_wide = is_slow or (q.dtype == wide and q.is_cpu)
    # The backward pass takes the output for the sum of the probabilities that it computes itself;
    # those of another kernel are rounded otherwise.
    by_kernel = not needs_gradient and native.can_attend(call, q)
    # Only the explicit form, in 32 bits, can drop the same probabilities again going back.
    if not (by_kernel or is_wide or call.dropout[0]):
        return _fused(q, k, v, call), _log_sums(q, k, call) if needs_lse else None
    lse = q.new_empty(*q.shape[:2], 1, dtype=wide) if needs_lse else None
    if by_kernel:
        return native.attend(call, q, k, v, lse), lse
    return _explicit(q.to(wide), k.to(wide), v.to(wide), call, lse).to(q.dtype), lse


def _backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.dtype == wide:
        # Of the output's rounding rows with few keys suffer most; the windows of encoders are wide.
        is_plain = call.dilation == 1 and not call.is_causal
        return _gradients(q, k, v, grad, out if is_plain else None, call)
    # In 32 bits: many blocks add to the gradient of one key, most of all of a global one. The
    # output is rounded, so it is of no use.
    parts = _gradients(q.to(wide), k.to(wide), v.to(wide), grad.to(wide), None, call)
    dq, dk, dv = (part.to(q.dtype) for part in parts)
    return dq, dk, dv


def _product_flops(shape: Sequence[int], blocks: Iterable[Block], num_heads: int) -> int:
    """Return the flops of one product of all blocks' queries and keys, for torch's counter."""
    pairs = sum(b.num_queries * (b.num_keys + b.num_globals) for b in blocks)
    return 2 * pairs * num_heads * shape[2]


@register_flop_formula(torch.ops.longhaul.blocked_attention)
def _(q: Sequence[int], *given: Any, **_: Any) -> int:
    calls = calls_of(*given[2:-2])
    return 2 * sum(_product_flops(q, call.blocks, call.num_heads) for call in calls)


@register_flop_formula(torch.ops.longhaul.blocked_attention_backward)
def _(_grad: Any, q: Sequence[int], *given: Any, **_: Any) -> int:
    calls = calls_of(*given[3:])
    return 5 * sum(_product_flops(q, call.blocks, call.num_heads) for call in calls)


def _without_invalid(rows: Tensor, is_valid: Tensor | None, value: float) -> Tensor:
    if is_valid is None:
        return rows
    return rows.masked_fill(~is_valid[:, None, None], value)


class _Masks:
    """Additive masks of one call; everything that does not depend on a block is made once."""

    def __init__(self, call: Call, like: Tensor) -> None:
        self._call = call
        self._strand = call.strand
        self.before, self.after = call.layout.plan(
            ("triangles", like.dtype), lambda: _triangles(most_queries(like.device), like)
        )
        self.keys = None
        is_valid = self._strand.is_valid
        if is_valid is not None:
            # Finite, so that an invalid query among invalid keys is a number and not NaN; its row
            # is set to zero at the end. Half the range leaves room to add a score.
            low = torch.finfo(like.dtype).min / 2
            self.keys = torch.zeros_like(is_valid, dtype=like.dtype).masked_fill_(~is_valid, low)

    def add(self, scores: Tensor, block: Block) -> None:
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
            scores[..., :w].add_(self.keys[block.keys])
        if block.masks_globals:
            columns = scores[..., w : w + block.num_globals]
            columns.masked_fill_(self._hidden_globals(block), -torch.inf)

    def _hidden_globals(self, block: Block) -> Tensor:
        """Return [C, g]: the query has the global in its band, or it lies ahead of it."""
        call, order = self._call, self._strand.order
        columns = self._strand.global_index[block.globals]
        queries = torch.arange(block.queries.start, block.queries.stop, device=columns.device)
        distance = queries[:, None] - columns
        if order is None:
            return (distance if call.is_causal else distance.abs()) <= call.radius
        # Places of another run may be near, and are of another residue class.
        is_own = (columns >= block.keys.start) & (columns < block.keys.stop)
        hidden = (distance.abs() <= call.radius).logical_and_(is_own)
        if call.is_causal:
            hidden.logical_or_(order[queries][:, None] < order[columns])
        return hidden


def _triangles(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return two masks [size, size]: one hides x < y, the other x >= y (row y, column x)."""
    hidden = like.new_full((size, size), -torch.inf)
    return hidden.tril(-1), hidden.triu()


class _Scores:
    """The probabilities of one block after another, in buffers that all blocks share.

    The explicit form: two products around a softmax, the fastest on CPUs.
    """

    def __init__(self, q: Tensor, k: Tensor, call: Call) -> None:
        """Pick the global tokens' keys."""
        self.q, self.k, self._call = q, k, call
        self.k_global = k[call.strand.global_index]
        self._columns = self.k_global * call.scale
        self._masks = _Masks(call, q)
        self._size = max((math.prod(self._shape(block)) for block in call.blocks), default=0)
        self._buffers: dict[str, Tensor] = {}
        self._tails: dict[tuple[object, ...], Tensor] = {}

    def _shape(self, block: Block) -> tuple[int, int, int]:
        """Return [H, C, W + g and some]."""
        return self.q.shape[1], block.num_queries, block.row_length

    def _buffer(self, name: str, block: Block) -> Tensor:
        """Return [H, C, W + g and some], with what is left of the last block of that name."""
        if name not in self._buffers:
            self._buffers[name] = self.q.new_empty(self._size)
        shape = self._shape(block)
        return self._buffers[name][: math.prod(shape)].view(shape)

    def product(
        self,
        name: str,
        block: Block,
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
        queries = block.of_queries(rows)
        out, w, g = self._buffer(name, block), block.num_keys, block.num_globals
        seen = block.of_keys(keys, out.shape[-1]).transpose(1, 2)
        whole = out if seen.shape[-1] == out.shape[-1] else out[..., : seen.shape[-1]]
        whole.baddbmm_(queries, seen, beta=0, alpha=scale)
        if g:
            tail = self._tail(name, block, rest)
            tail[..., :g] = torch.bmm(queries, block.of_globals(columns).transpose(1, 2))
            out[..., w:] = tail
        return out

    def _tail(self, name: str, block: Block, rest: float) -> Tensor:
        """Return [H, C, g and some] for the columns of the globals, the others `rest`."""
        shape = (self.q.shape[1], block.num_queries, block.row_length - block.num_keys)
        key = (name, shape, block.num_globals)
        if key not in self._tails:
            self._tails[key] = self.q.new_full(shape, rest)
        return self._tails[key]

    def probabilities(self, block: Block, lse: Tensor | None = None) -> Tensor:
        """Return the softmax of a block's scores; their lse goes to its places in [T, h, 1]."""
        inputs, scale = (self.q, self.k, self._columns), self._call.scale
        scores = self.product("p", block, *inputs, scale=scale, rest=-torch.inf)
        self._masks.add(scores, block)
        if lse is None:
            return torch.softmax(scores, -1, out=scores)
        peak = scores.amax(-1, keepdim=True)
        torch.softmax(scores, -1, out=scores)
        # The largest probability is exp(peak - lse).
        log_sums = peak - scores.amax(-1, keepdim=True).log()  # [H, C, 1]
        lse[block.queries] = log_sums.transpose(0, 1)
        return scores

    def kept(self, block: Block) -> Tensor | None:
        """Return 0 where dropout strikes and 1 / (1 - p) elsewhere: the same on every call."""
        p, seed = self._call.dropout
        if not p:
            return None
        draw = torch.Generator(self.q.device).manual_seed(seed + block.queries.start)
        return draw_kept(self._buffer("kept", block), p, draw)


def _explicit(q: Tensor, k: Tensor, v: Tensor, call: Call, lse: Tensor | None) -> Tensor:
    scores, v_global = _Scores(q, k, call), v[call.strand.global_index]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for block in call.blocks:
        w, g = block.num_keys, block.num_globals
        p, kept = scores.probabilities(block, lse), scores.kept(block)
        if kept is not None:
            p *= kept
        mixed = torch.bmm(p[..., :w], block.of_keys(v))
        if g:
            mixed.baddbmm_(p[..., w : w + g], block.of_globals(v_global))
        out[block.queries] = mixed.transpose(0, 1)
    return out


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor | None, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, given that of the output; `out` saves work if exact.

    Source: FlashAttention, arXiv:2205.14135, appendix B.
    """
    scores = _Scores(q, k, call)
    chosen = call.strand.global_index
    v_global = v[chosen]
    # Each row of probabilities times its own gradients, summed: what the softmax takes off.
    taken = None if out is None else (out * grad).sum(-1).t()[..., None].contiguous()
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    dk_global, dv_global = torch.zeros_like(scores.k_global), torch.zeros_like(v_global)
    for block in call.blocks:
        queries, rows = block.of_queries(q), block.of_queries(grad)
        w, columns = block.num_keys, slice(block.num_keys, block.num_keys + block.num_globals)
        p, kept = scores.probabilities(block), scores.kept(block)
        dS = scores.product("dS", block, grad, v, v_global)
        mixed = p
        if kept is not None:
            dS *= kept
            mixed = kept.mul_(p)
        block.of_keys(dv).baddbmm_(mixed[..., :w].transpose(1, 2), rows)
        off = torch.linalg.vecdot(dS, p)[..., None] if taken is None else taken[:, block.queries]
        dS.sub_(off).mul_(p)
        block.of_keys(dk).baddbmm_(dS[..., :w].transpose(1, 2), queries, alpha=call.scale)
        turned = torch.bmm(dS[..., :w], block.of_keys(k))
        if block.num_globals:
            turned.baddbmm_(dS[..., columns], block.of_globals(scores.k_global))
            by_column = dS[..., columns].transpose(1, 2)
            block.of_globals(dk_global).baddbmm_(by_column, queries, alpha=call.scale)
            block.of_globals(dv_global).baddbmm_(mixed[..., columns].transpose(1, 2), rows)
        dq[block.queries] = turned.mul_(call.scale).transpose(0, 1)
    dk.index_add_(0, chosen, dk_global)
    dv.index_add_(0, chosen, dv_global)
    return dq, dk, dv


def _fused(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Call scaled_dot_product_attention per block: right in 16 bits, on any device."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    masks = _Masks(call, q)
    k_global, v_global = (x[call.strand.global_index] for x in (k, v))
    for block in call.blocks:
        keys = torch.cat([block.of_keys(k), block.of_globals(k_global)], 1)
        values = torch.cat([block.of_keys(v), block.of_globals(v_global)], 1)
        bias = q.new_zeros(block.num_queries, block.num_keys + block.num_globals)
        masks.add(bias, block)
        mixed = scaled_dot_product_attention(
            block.of_queries(q)[None], keys[None], values[None], attn_mask=bias, scale=call.scale
        )
        out[block.queries] = mixed[0].transpose(0, 1)
    return out


def _log_sums(q: Tensor, k: Tensor, call: Call) -> Tensor:
    """Return the lse [T, h, 1] of inputs of 16 bits, which `_fused` does not tell."""
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(*q.shape[:2], 1, dtype=wide)
    scores = _Scores(q.to(wide), k.to(wide), call)
    for block in call.blocks:
        scores.probabilities(block, lse)
    return lse
