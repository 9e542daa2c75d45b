"""What rows remember of the tokens they have written, while texts are generated.

Shape letters: N documents, b rows (beams) per document, R = N * b rows, H heads, D head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longformer_core.errors import ShapeError

_FIRST_CAPACITY = 16


class DecoderCache:
    """Self-attention keys and values of rows that grow by one token per step.

    Every token is written once and never moved: the beams of a document share its tokens, and a
    mask says which of them are a row's own history. Taking another beam's history is a gather of
    mask rows only. Documents come and go while others stay where they are; they may be at
    different steps, and the rows of one may go back to fewer tokens together.
    Units: `max_length` in tokens of one row. Memory grows with the tokens written, not with it.
    """

    def __init__(
        self,
        num_layers: int,
        rows_per_document: int,
        num_heads: int,
        head_dim: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make a cache without documents; memory is taken at the first step."""
        self.rows_per_document = rows_per_document
        self.max_length = max_length
        self.num_documents = 0
        self._lengths = torch.zeros(0, dtype=torch.int64)
        # keys, values [N, H, capacity * b, D], a step's tokens side by side; what a row sees, as an
        # additive mask [N, b, capacity, b]. The first `num_documents` of N are in use.
        empty = torch.zeros(0, num_heads, 0, head_dim, dtype=dtype, device=device)
        self._keys = [empty] * num_layers
        self._values = [empty] * num_layers
        b = rows_per_document
        self._bias = torch.zeros(0, b, 0, b, dtype=dtype, device=device)

    @property
    def num_rows(self) -> int:
        """Return how many rows step together."""
        return self.num_documents * self.rows_per_document

    @property
    def num_bytes(self) -> int:
        """Return the memory that keys, values and mask take."""
        return self._bias.nbytes + sum(t.nbytes for t in (*self._keys, *self._values))

    def add(self, num_documents: int, max_length: int = 0) -> None:
        """Append documents without tokens, whose rows will hold up to `max_length` of them."""
        self.max_length = max(self.max_length, max_length)
        first, self.num_documents = self.num_documents, self.num_documents + num_documents
        self._lengths = torch.cat([self._lengths, torch.zeros(num_documents, dtype=torch.int64)])
        self._bias[first : self.num_documents] = -torch.inf
        # A masked slot still adds zero times its value, and what was here before may be NaN.
        for tensor in (*self._keys, *self._values):
            tensor[first : self.num_documents] = 0.0

    def begin_step(self, lengths: Tensor) -> None:
        """Make room for one token per row, at these positions, and let each row see its own.

        Shapes: lengths [R], the same for all rows of a document.
        Raises: ShapeError when the rows do not fit the cache or a row is already full.
        """
        if len(lengths) != self.num_rows:
            raise ShapeError(f"{len(lengths)} rows step but the cache holds {self.num_rows}")
        by_document = lengths.cpu()[:: self.rows_per_document]
        self._used = int(by_document.max()) + 1 if len(by_document) else 0
        if self._used > self.max_length:
            raise ShapeError(
                f"a row holds {self._used - 1} tokens already and the cache was made for "
                f"{self.max_length}; ask new_cache for more"
            )
        self._grow()
        n, device = self.num_documents, self._bias.device
        back = (by_document < self._lengths).nonzero()[:, 0]
        for document in back.tolist():
            # It must not see what was written after the token that it goes back to.
            self._bias[document, :, by_document[document] :] = -torch.inf
        self._lengths = by_document + 1
        self._documents = torch.arange(n, device=device).repeat_interleave(self.rows_per_document)
        beams = torch.arange(self.rows_per_document, device=device).repeat(n)
        steps = lengths.to(device)
        self._slots = steps * self.rows_per_document + beams
        self._bias[self._documents, beams, steps, beams] = 0.0
        self._mask = self._bias[:n, :, : self._used].flatten(2).unsqueeze(1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write this step's keys and values, then let each row attend to its history and itself.

        Shapes: q, k, v [R, H, D]; returns [R, H * D].
        """
        n, b, written = self.num_documents, self.rows_per_document, self._used
        keys, values = self._keys[layer], self._values[layer]
        keys[self._documents, :, self._slots] = k
        values[self._documents, :, self._slots] = v
        out = scaled_dot_product_attention(
            q.view(n, b, *q.shape[1:]).transpose(1, 2),
            keys[:n, :, : written * b],
            values[:n, :, : written * b],
            attn_mask=self._mask,
        )
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def reorder(self, parents: Tensor) -> None:
        """Let row i continue the history of row `parents[i]` [R], which is of the same document."""
        n, b = self.num_documents, self.rows_per_document
        beams = (parents % b).view(n, b, 1, 1).expand(-1, -1, *self._bias.shape[2:])
        self._bias[:n] = self._bias[:n].gather(1, beams)

    def select(self, documents: Sequence[int], max_length: int | None = None) -> None:
        """Keep these documents, in this order; only those that change places are moved.

        Memory is given back once more than half of it would stay unused. `max_length` is the new
        limit of a row, None leaves it.
        """
        moved = [(new, old) for new, old in enumerate(documents) if new != old]
        self.num_documents = len(documents)
        self._lengths = self._lengths[list(documents)]
        if moved:
            new, old = torch.tensor(moved, device=self._bias.device).unbind(1)
            for tensor in (self._bias, *self._keys, *self._values):
                tensor[new] = tensor[old]
        if max_length is not None:
            self.max_length = max_length
        room, capacity = self._bias.shape[0], self._bias.shape[2]
        fitting = min(capacity, self.max_length)
        if room * capacity > 2 * self.num_documents * fitting:
            self._resize(self.num_documents, fitting)

    def _grow(self) -> None:
        """Make room for the documents and steps in use, and some more."""
        room, capacity = self._bias.shape[0], self._bias.shape[2]
        if self.num_documents > room or self._used > capacity:
            if self._used > capacity:
                capacity = min(self.max_length, max(2 * capacity, _FIRST_CAPACITY, self._used))
            # Documents that come one by one: doubled, so that not each of them copies all others.
            room = max(self.num_documents, min(2 * room, self.num_documents + 8))
            self._resize(room, capacity)

    def _resize(self, room: int, capacity: int) -> None:
        b = self.rows_per_document
        self._bias = _resized(self._bias, (room, b, capacity, b), -torch.inf)
        for store in (self._keys, self._values):
            for layer, tensor in enumerate(store):
                _, heads, _, head_dim = tensor.shape
                store[layer] = _resized(tensor, (room, heads, capacity * b, head_dim), 0.0)


def _resized(old: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
    """Return a tensor of this shape that begins as the old one does in every dimension."""
    new = old.new_full(shape, fill)
    both = tuple(slice(min(sizes)) for sizes in zip(old.shape, shape, strict=True))
    new[both] = old[both]
    return new
