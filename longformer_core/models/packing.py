"""From the padded batches of the published interface to packed ones, and back.

Shape letters: B documents, S slots of each, T packed tokens, N slots of targets, d hidden size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longformer_core.errors import ConfigError, ShapeError
from longformer_core.layout import Layout


@dataclass(frozen=True)
class PaddedBatch:
    """Which slots of a padded batch [B, S] are packed, and which packed token answers each slot.

    index: [T] slots of the flattened batch; answer: [B * S] packed tokens. None when all slots are
    packed in their order.
    """

    batch_size: int
    num_slots: int
    layout: Layout
    index: Tensor | None
    answer: Tensor | None

    def pack(self, padded: Tensor) -> Tensor:
        """Return [T, ...] of padded [B, S, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, packed: Tensor) -> Tensor:
        """Return [B, S, ...] of packed [T, ...]."""
        if self.answer is not None:
            packed = packed.index_select(0, self.answer)
        return packed.view(self.batch_size, self.num_slots, *packed.shape[1:])

    def unpack_maps(self, maps: Iterable[Tensor]) -> tuple[Tensor, ...] | None:
        """Return [B, H, S, x] of each packed [T, H, x]; None when x is 0."""
        unpacked = tuple(self.unpack(packed).transpose(1, 2) for packed in maps)
        return unpacked if unpacked and unpacked[0].shape[-1] else None


def padded_batch(
    features: Sequence[Tensor],
    attention_mask: Tensor | None,
    global_attention_mask: Tensor | None,
) -> PaddedBatch:
    """Describe a padded batch by its masks.

    A slot is masked where `attention_mask` is 0 or `global_attention_mask` is negative (the
    tokenizer's padding), and global where it is not masked and either mask says so (2 in
    `attention_mask`, above 0 in `global_attention_mask`). A masked slot between a document's first
    and last token keeps its place, for distances count it. Those around it attend to nothing and
    nothing attends to them, so their states follow from their features alone: one of each kind is
    packed, in a document of its own, and answers for all of them.
    Shapes: features, all that the first states depend on, and both masks [B, S]; a mask may have
        any dtype, None stands for all ones and for all zeros.
    Raises: ShapeError when a shape is another.
    """
    shape, device = features[0].shape, features[0].device
    masks = (("attention_mask", attention_mask), ("global_attention_mask", global_attention_mask))
    for name, mask in masks:
        if mask is not None and mask.shape != shape:
            raise ShapeError(f"{name} has shape {list(mask.shape)}; the tokens have {list(shape)}")
    kind = torch.ones(shape, dtype=torch.int64)
    if attention_mask is not None:
        kind = attention_mask.detach().to("cpu", torch.int64)
    if global_attention_mask is not None:
        kind = kind * (global_attention_mask.detach().to("cpu", torch.int64) + 1)
    batch_size, num_slots = shape
    count = torch.arange(num_slots)
    is_token = kind > 0
    ends = ((is_token * (count + 1)).amax(1) if num_slots else count.new_zeros(batch_size))[:, None]
    starts = (is_token.int().argmax(1) if num_slots else count.new_zeros(batch_size))[:, None]
    is_packed = (count >= starts) & (count < ends)
    lengths = (ends - starts)[:, 0].tolist()
    valid = is_token[is_packed]
    chosen = [
        (row.nonzero()[:, 0] - start).tolist() for row, start in zip(kind > 1, starts, strict=True)
    ]
    if bool(is_packed.all()):
        layout = Layout.from_lengths(lengths, chosen, valid, device=device)
        return PaddedBatch(batch_size, num_slots, layout, None, None)
    slots, rest = (flags.flatten().nonzero()[:, 0].to(device) for flags in (is_packed, ~is_packed))
    rows = torch.stack([feature.flatten()[rest] for feature in features], 1)
    kinds, which = torch.unique(rows, dim=0, return_inverse=True)
    models = rest.new_empty(len(kinds)).scatter_(0, which, rest)
    answer = rest.new_empty(batch_size * num_slots)
    answer[slots] = torch.arange(len(slots), device=device)
    answer[rest] = len(slots) + which
    layout = Layout.from_lengths(
        [*lengths, len(kinds)],
        [*chosen, []],
        torch.cat([valid, valid.new_zeros(len(kinds))]),
        device=device,
    )
    return PaddedBatch(batch_size, num_slots, layout, torch.cat([slots, models]), answer)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, start_token_id: int) -> Tensor:
    """Return ids [B, N] moved one place on, behind the start token; -100 becomes padding.

    Raises: ConfigError when there is no padding token.
    """
    if pad_token_id is None:
        raise ConfigError("pad_token_id is None; what a decoder reads needs a padding token")
    shifted = input_ids.roll(1, -1)
    shifted[:, :1] = start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def one_of(ids: Tensor | None, embeds: Tensor | None, name: str) -> Tensor:
    """Return ids [B, N] or embeddings [B, N, d], whichever is given.

    Raises: ShapeError unless exactly one of them is.
    """
    tokens = embeds if ids is None else ids
    if tokens is None or (ids is not None and embeds is not None):
        raise ShapeError(f"give either {name}_ids or {name}s_embeds, and only one of them")
    return tokens
