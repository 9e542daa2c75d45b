"""What a decoder remembers of the tokens it has written.

Shape letters: N documents, b rows (beams) per document, R = N * b rows, H heads, D head dimension.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longformer_core.attention.source import Source
from longformer_core.errors import ShapeError

_FIRST_CAPACITY = 16


class DecoderCache:
    """Self-attention keys and values of rows that grow by one token per step.

    Every token is written once and never moved: the beams of a document share its tokens, and a
    mask says which of them are a row's own history. Taking another beam's history is a gather of
    mask rows only; leaving documents out gathers the keys and values too.
    Rows may be at different steps. The rows of a document may go back to fewer tokens together.
    Units: `max_length` in tokens of one row. Memory grows with the tokens written, not with it.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_heads: int,
        head_dim: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make an empty cache; memory is taken at the first step."""
        self.num_rows = num_rows
        self.max_length = max_length
        self._rows_per_document = 0
        self._capacity = 0
        self._used = 0
        # keys, values [N, H, capacity * b, D], a step's tokens side by side; mask [R, capacity, b].
        empty = torch.zeros(0, num_heads, 0, head_dim, dtype=dtype, device=device)
        self._keys = [empty] * num_layers
        self._values = [empty] * num_layers
        self._bias = torch.zeros(num_rows, 0, 0, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """Return the memory that keys, values and mask take."""
        return self._bias.nbytes + sum(t.nbytes for t in (*self._keys, *self._values))

    def begin_step(self, lengths: Tensor, rows_per_document: int) -> None:
        """Make room for one token per row, at these positions, and let each row see its own.

        Raises: ShapeError when the rows do not fit the cache or a row is already full.
        """
        shortest, longest = (int(n) for n in lengths.aminmax()) if len(lengths) else (0, 0)
        if len(lengths) != self.num_rows:
            raise ShapeError(f"{len(lengths)} rows step but the cache holds {self.num_rows}")
        if longest >= self.max_length:
            raise ShapeError(
                f"a row holds {longest} tokens already and the cache was made for "
                f"{self.max_length}; ask new_cache for more"
            )
        if self._rows_per_document not in (0, rows_per_document):
            raise ShapeError(
                f"the cache holds {self._rows_per_document} rows per document, not "
                f"{rows_per_document}; their number cannot change between steps"
            )
        self._rows_per_document = rows_per_document
        if longest >= self._capacity:
            self._grow(min(self.max_length, max(2 * self._capacity, _FIRST_CAPACITY, longest + 1)))
        self._same_step = shortest == longest
        lengths = lengths.to(self._bias.device)
        if longest < self._used or not self._same_step:
            # A document that starts over must not see what was written before.
            steps = torch.arange(self._capacity, device=lengths.device)
            self._bias.masked_fill_((steps >= lengths[:, None])[..., None], -torch.inf)
        self._used = longest + 1
        rows = torch.arange(self.num_rows, device=lengths.device)
        beams = rows % rows_per_document
        self._bias[rows, lengths, beams] = 0.0
        self._documents = rows // rows_per_document
        self._slots = lengths * rows_per_document + beams

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write this step's keys and values, then let each row attend to its history and itself.

        Shapes: q, k, v [R, H, D]; returns [R, H * D].
        """
        b, used = self._rows_per_document, self._used
        beams = (self.num_rows // b, b)
        keys, values = self._keys[layer], self._values[layer]
        if self._same_step:
            step = slice((used - 1) * b, used * b)
            keys[:, :, step] = k.view(*beams, *k.shape[1:]).transpose(1, 2)
            values[:, :, step] = v.view(*beams, *v.shape[1:]).transpose(1, 2)
        else:
            keys[self._documents, :, self._slots] = k
            values[self._documents, :, self._slots] = v
        bias = self._bias[:, :used].flatten(1).view(*beams, used * b).unsqueeze(1)
        out = scaled_dot_product_attention(
            q.view(*beams, *q.shape[1:]).transpose(1, 2),
            keys[:, :, : used * b],
            values[:, :, : used * b],
            attn_mask=bias,
        )
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def reorder(self, row_index: Tensor) -> "DecoderCache":
        """Let new row i continue the history of old row `row_index[i]`; return self.

        Rows may be taken several times or left out. The rows of one document must all come from
        one document: another beam of the same one, or a whole other one.
        Raises: ShapeError when they do not.
        """
        b = self._rows_per_document
        if not b:
            self.num_rows = len(row_index)
            return self
        documents = row_index.div(b, rounding_mode="floor")
        firsts = documents[::b]
        if len(row_index) % b or not torch.equal(documents, firsts.repeat_interleave(b)):
            raise ShapeError(
                f"rows {row_index.tolist()} mix histories of several documents; every {b} rows "
                "are one document's and must continue one document's rows"
            )
        self.num_rows = len(row_index)
        self._bias = self._bias.index_select(0, row_index.to(self._bias.device))
        num_documents = len(self._keys[0])
        if len(firsts) != num_documents or not torch.equal(
            firsts, torch.arange(num_documents, device=firsts.device)
        ):
            for store in (self._keys, self._values):
                for layer, tensor in enumerate(store):
                    store[layer] = tensor.index_select(0, firsts.to(tensor.device))
        return self

    def _grow(self, capacity: int) -> None:
        b, old = self._rows_per_document, self._capacity
        bias = self._bias.new_full((self.num_rows, capacity, b), -torch.inf)
        if old:
            bias[:, :old] = self._bias
        self._bias, self._capacity = bias, capacity
        for store in (self._keys, self._values):
            for layer, tensor in enumerate(store):
                # Zeros, for a masked slot still adds zero times its value, and NaN would pass.
                _, num_heads, _, head_dim = tensor.shape
                grown = tensor.new_zeros(self.num_rows // b, num_heads, capacity * b, head_dim)
                if old:
                    grown[:, :, : old * b] = tensor
                store[layer] = grown


class DecoderPast:
    """Keys and values of whole targets, and the sources they are written about.

    What the published forward takes and returns as `past_key_values`: targets of one length, each
    call adding the tokens that are new. Generation has `DecoderCache`.
    """

    def __init__(self, source: Source, batch_size: int) -> None:
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
