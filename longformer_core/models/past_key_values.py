"""What the published forward of a decoder remembers of whole targets between two calls.

Shape letters: B documents, N new tokens of each target, H heads, D head dimension.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longformer_core.attention.cross_attention import CrossAttentionCache
from longformer_core.errors import ShapeError


class DecoderPast:
    """Keys and values of whole targets, and the sources they are written about.

    What the published forward takes and returns as `past_key_values`: targets of one length, each
    call adding the tokens that are new. Generation has `generation.kv_cache.BeamKVCache`.
    """

    def __init__(self, source: CrossAttentionCache, batch_size: int) -> None:
        """Begin with no token."""
        self.source = source
        self.batch_size = batch_size
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        """Return the tokens of a target that are held."""
        return self.length

    def view(
        self, num_new: int, mask: Tensor | None, *, keep: bool, dropout_p: float
    ) -> "PastView":
        """Return the attention of `num_new` tokens per target, added to those held if `keep`.

        Shapes: mask [B, length + num_new], 0 at targets' tokens that nothing may attend to.
        Raises: ShapeError for a mask of another shape.
        """
        total = self.length + num_new
        if mask is not None and mask.shape != (self.batch_size, total):
            raise ShapeError(
                f"decoder_attention_mask has shape {list(mask.shape)}; with {self.length} tokens "
                f"held and {num_new} new ones it must be {[self.batch_size, total]}"
            )
        return PastView(self, num_new, mask, keep, dropout_p)


class PastView:
    """One call's causal attention of new target tokens to the held ones and to one another."""

    def __init__(
        self, past: DecoderPast, num_new: int, mask: Tensor | None, keep: bool, dropout_p: float
    ) -> None:
        """See `DecoderPast.view`."""
        self._past, self._num_new, self._keep, self._dropout_p = past, num_new, keep, dropout_p
        self._held = past.length
        self._mask = mask
        self.maps: list[Tensor] | None = None
        if keep:
            past.length += num_new

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [B * N, H * D] of queries, keys and values [B * N, H, D] of the new tokens."""
        q, k, v = (t.view(-1, self._num_new, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        if layer in self._past._layers:
            keys, values = self._past._layers[layer]
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        if self._keep:
            self._past._layers[layer] = (k, v)
        seen = self._seen(q.device)
        if self.maps is not None:
            scores = (q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5
            self.maps.append(scores.masked_fill(~seen, -torch.inf).softmax(-1))
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=self._dropout_p)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def _seen(self, device: torch.device) -> Tensor:
        """Return [1 or B, 1, N, held + N]: what each new token may attend to.

        A masked token still sees itself, for a row that sees nothing would be NaN.
        """
        new = torch.arange(self._held, self._held + self._num_new, device=device)[:, None]
        keys = torch.arange(self._held + self._num_new, device=device)
        causal = (keys <= new)[None, None]
        if self._mask is None:
            return causal
        visible = self._mask.to(device).bool()[:, None, None]
        return (causal & visible) | (keys == new)
