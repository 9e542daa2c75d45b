"""Window attention in blocks of queries, in plain PyTorch: any device, memory linear in tokens.

A block is C consecutive queries of one document. Its keys are the W tokens within `radius` of any
of them, as a view, and the document's global tokens as extra columns. Only two corners of the band
need a mask, each a triangle that all blocks share; a global column is masked for the queries that
have the token in their band already, so that it counts once.
Shape letters: T packed tokens, H heads, D head dimension, C, W as above, g globals of the document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longformer_core.layout import Layout

# Queries of a block. Few keep the keys that no query of the block sees few; many keep the matrices
# large. Documents up to _WHOLE tokens are one block.
_BLOCK = {"cpu": 128}
_BLOCK_ELSEWHERE = 512
_WHOLE = 256
# Score rows are padded to this many columns when global columns make their length odd.
_ALIGN = 16


@dataclass(frozen=True)
class _Block:
    """Slots of a block's queries and keys, and its document's range in `layout.global_index`."""

    queries: slice
    keys: slice
    globals: slice
    num_queries: int
    num_keys: int
    num_globals: int
    near_global: bool


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, radius: int, scale: float
) -> Tensor:
    """Compute `window_attention` block by block; differentiable.

    Numerics: softmax in float32 for narrower inputs.
    """
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    blocks = layout.plan(("blocks", radius), lambda: list(_blocks(layout, radius)))
    masks = _Masks(layout, radius, q)
    if needs_grad or q.device.type != "cpu" or q.dtype not in (torch.float32, torch.float64):
        out = _fused_blocks(q, k, v, layout, blocks, masks, scale)
    else:
        out = _matmul_blocks(q, k, v, layout, blocks, masks, scale)
    if layout.is_valid is None:
        return out
    return out.masked_fill(~layout.is_valid[:, None, None], 0.0)


def _blocks(layout: Layout, radius: int) -> Iterator[_Block]:
    size = _BLOCK.get(layout.device.type, _BLOCK_ELSEWHERE)
    global_ends = accumulate(layout.num_globals)
    for (start, end), positions, global_end in zip(
        pairwise(layout.cu_seqlens), layout.global_positions, global_ends, strict=True
    ):
        columns = slice(global_end - len(positions), global_end)
        step = end - start if end - start <= _WHOLE else size
        for first in range(start, end, max(step, 1)):
            last = min(first + step, end)
            low, high = max(start, first - radius), min(end, last + radius)
            yield _Block(
                queries=slice(first, last),
                keys=slice(low, high),
                globals=columns,
                num_queries=last - first,
                num_keys=high - low,
                num_globals=len(positions),
                near_global=any(low <= start + position < high for position in positions),
            )


class _Masks:
    """Additive masks of one call; everything that does not depend on a block is made once."""

    def __init__(self, layout: Layout, radius: int, like: Tensor) -> None:
        self._radius = radius
        self._globals = layout.global_index
        size = max(_BLOCK.get(like.device.type, _BLOCK_ELSEWHERE), _WHOLE)
        self.before, self.after = layout.plan(
            ("triangles", like.dtype), lambda: _triangles(size, like)
        )
        self.keys = None
        if layout.is_valid is not None:
            # Finite, so that an invalid query among invalid keys is a number and not NaN; its row
            # is set to zero at the end. Half the range leaves room to add a score.
            low = torch.finfo(like.dtype).min / 2
            self.keys = torch.zeros_like(layout.is_valid, dtype=like.dtype)
            self.keys.masked_fill_(~layout.is_valid, low)

    def add(self, scores: Tensor, block: _Block) -> None:
        """Mask scores [..., C, W + g], keys first, in place."""
        c, w = block.num_queries, block.num_keys
        # Query y sees key x from x = y - skip on, and up to x = y + wide.
        skip = self._radius - (block.queries.start - block.keys.start)
        left = c - 1 - skip
        if left > 0:
            scores[..., skip:, :left] += self.before[: c - skip, :left]
        right = block.keys.stop - (block.queries.start + self._radius + 1)
        if right > 0:
            scores[..., w - right : w] += self.after[:c, :right]
        if self.keys is not None:
            scores[..., :w] += self.keys[block.keys]
        if block.near_global:
            queries = torch.arange(
                block.queries.start, block.queries.stop, device=self._globals.device
            )
            distance = (queries[:, None] - self._globals[block.globals]).abs()
            columns = scores[..., w : w + block.num_globals]
            columns.masked_fill_(distance <= self._radius, -torch.inf)


def _triangles(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return two masks [size, size]: one hides x < y, the other x >= y (row y, column x)."""
    hidden = like.new_full((size, size), -torch.inf)
    return hidden.tril(-1), hidden.triu()


def _matmul_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    blocks: list[_Block],
    masks: _Masks,
    scale: float,
) -> Tensor:
    """Fill the output through one reused score buffer: the fastest form on CPUs, without grad."""
    num_heads = q.shape[1]
    q_heads, k_heads, v_heads = ((x.transpose(0, 1)) for x in (q * scale, k, v))
    k_global, v_global = (x[layout.global_index].transpose(0, 1) for x in (k, v))
    sizes = [(block, _row_length(block)) for block in blocks]
    buffer = q.new_empty(num_heads * max((b.num_queries * row for b, row in sizes), default=0))
    out = torch.empty_like(q)
    for block, row in sizes:
        c, w, g = block.num_queries, block.num_keys, block.num_globals
        scores = buffer[: num_heads * c * row].view(num_heads, c, row)
        band, columns = scores[..., :w], scores[..., w : w + g]
        queries = q_heads[:, block.queries]
        torch.bmm(queries, k_heads[:, block.keys].transpose(1, 2), out=band)
        if g:
            columns.copy_(torch.bmm(queries, k_global[:, block.globals].transpose(1, 2)))
            scores[..., w + g :] = -torch.inf
        masks.add(scores, block)
        torch.softmax(scores, -1, out=scores)
        mixed = torch.bmm(band, v_heads[:, block.keys])
        if g:
            mixed.baddbmm_(columns, v_global[:, block.globals])
        out[block.queries] = mixed.transpose(0, 1)
    return out


def _row_length(block: _Block) -> int:
    if not block.num_globals:
        return block.num_keys
    return -(-(block.num_keys + block.num_globals) // _ALIGN) * _ALIGN


def _fused_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    blocks: list[_Block],
    masks: _Masks,
    scale: float,
) -> Tensor:
    """Call scaled_dot_product_attention per block: differentiable, and right in 16 bits."""
    q_heads, k_heads, v_heads = (x.transpose(0, 1) for x in (q, k, v))
    k_global, v_global = (x[layout.global_index].transpose(0, 1) for x in (k, v))
    outputs = [q_heads[:, :0]]
    for block in blocks:
        bias = q.new_zeros(block.num_queries, block.num_keys + block.num_globals)
        masks.add(bias, block)
        keys = torch.cat([k_heads[:, block.keys], k_global[:, block.globals]], 1)
        values = torch.cat([v_heads[:, block.keys], v_global[:, block.globals]], 1)
        queries = q_heads[:, block.queries]
        out = scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=bias[None], scale=scale
        )
        outputs.append(out[0])
    return torch.cat(outputs, 1).transpose(0, 1)
