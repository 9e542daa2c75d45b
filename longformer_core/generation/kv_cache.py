"""What rows remember of the tokens they have written, while texts are generated.

Shape letters: N documents, b rows (beams) per document, R = N * b rows, H heads, D head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longformer_core.errors import ShapeError

_FIRST_CAPACITY = 16


class BeamKVCache:
    """Self-attention keys and values of rows that grow by one token per step.

    Every token is written once and never moved: the rows of a document share its tokens, and a
    mask says which of them are a row's own history. Taking another row's history is a gather of
    mask rows only. Documents come and go while others stay where they are.
    The rows of a document are beams, or with `is_speculative` one token after another of a single
    text: then each row sees those before it, and going on from one row leaves the later ones out.
    Memory grows with the steps, at most to those of the document that may take most.
    With `has_fixed_shapes` a step looks at all of that memory, not at the part in use: while
    documents and memory stay, all steps are the same operations on the same tensors.
    """

    def __init__(
        self,
        num_layers: int,
        rows_per_document: int,
        num_heads: int,
        head_dim: int,
        *,
        is_speculative: bool = False,
        has_fixed_shapes: bool = False,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make a cache without documents; memory is taken at the first step."""
        self.rows_per_document = rows_per_document
        self._is_speculative, self._has_fixed_shapes = is_speculative, has_fixed_shapes
        # Of each document the steps taken, and how many it may take.
        self._steps: list[int] = []
        self._max_steps: list[int] = []
        # keys, values [N, H, capacity * b, D], a step's tokens side by side; what a row sees, as an
        # additive mask [N, b, capacity, b]. The first `num_documents` of N are in use.
        empty = torch.zeros(0, num_heads, 0, head_dim, dtype=dtype, device=device)
        self._keys = [empty] * num_layers
        self._values = [empty] * num_layers
        b = rows_per_document
        self._bias = torch.zeros(0, b, 0, b, dtype=dtype, device=device)
        # What a row sees of the tokens that its document writes in this very step.
        rows = torch.arange(b, device=device)
        seen = rows[:, None] >= rows if is_speculative else rows[:, None] == rows
        self._now = torch.zeros(b, b, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)

    @property
    def num_rows(self) -> int:
        """Return how many rows step together."""
        return self.num_documents * self.rows_per_document

    @property
    def num_bytes(self) -> int:
        """Return the memory that keys, values and mask take."""
        return self._bias.nbytes + sum(t.nbytes for t in (*self._keys, *self._values))

    @property
    def num_documents(self) -> int:
        """Return how many documents step together."""
        return len(self._max_steps)

    def add(self, max_steps: Sequence[int]) -> None:
        """Append documents without tokens, each of which takes at most so many steps."""
        first = self.num_documents
        self._max_steps += max_steps
        self._steps += [0] * len(max_steps)
        self._bias[first : self.num_documents] = -torch.inf
        # A masked slot still adds zero times its value, and what was here before may be NaN.
        for tensor in (*self._keys, *self._values):
            tensor[first : self.num_documents] = 0.0
        self._place()

    def _place(self) -> None:
        """Note where each row wrote last; kept on the device, so that steps need nothing else."""
        n, b, device = self.num_documents, self.rows_per_document, self._bias.device
        self._documents = torch.arange(n, device=device).repeat_interleave(b)
        self._rows = torch.arange(b, device=device).repeat(n)
        last = torch.tensor(self._steps, dtype=torch.int64) - 1
        self._last = last.to(device).repeat_interleave(b)

    @property
    def is_full(self) -> bool:
        """Return whether the next step needs more memory than there is."""
        return max(self._steps, default=-1) >= self._bias.shape[2]

    def begin_step(self) -> None:
        """Make room for one token per row, and let each row see its own.

        Raises: ShapeError when a document has taken all its steps.
        """
        self.count_step()
        n, b = self.num_documents, self.rows_per_document
        self._last += 1
        self._slots = self._last * b + self._rows
        self._bias[self._documents, self._rows, self._last] = self._now.repeat(n, 1)
        self._mask = self._bias[:n, :, : self._used].flatten(2).unsqueeze(1)

    def count_step(self) -> None:
        """Do what the host has to do for a step: all, where the device's part is replayed.

        Raises: as `begin_step`.
        """
        for document, (steps, most) in enumerate(zip(self._steps, self._max_steps, strict=True)):
            if steps >= most:
                raise ShapeError(
                    f"document {document} has taken the {most} steps that the cache was made for; "
                    "ask new_cache for more"
                )
        if self.is_full or self.num_documents > self._bias.shape[0]:
            self._grow()
        self._steps = [steps + 1 for steps in self._steps]
        self._used = max(self._steps, default=0)
        if self._has_fixed_shapes:
            self._used = self._bias.shape[2]

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

    def select(self, documents: Sequence[int]) -> None:
        """Keep these documents, in this order; only those that change places are moved.

        Memory is given back once more than half of it would stay unused.
        """
        moved = [(new, old) for new, old in enumerate(documents) if new != old]
        self._steps = [self._steps[document] for document in documents]
        self._max_steps = [self._max_steps[document] for document in documents]
        self._place()
        if moved:
            new, old = torch.tensor(moved, device=self._bias.device).unbind(1)
            for tensor in (self._bias, *self._keys, *self._values):
                tensor[new] = tensor[old]
        most_documents, capacity = self._bias.shape[0], self._bias.shape[2]
        fitting = min(capacity, max(self._max_steps, default=0))
        if most_documents * capacity > 2 * self.num_documents * fitting:
            self._resize(self.num_documents, fitting)

    def _grow(self) -> None:
        """Make room for the documents and the next step, and some more."""
        most_documents, capacity = self._bias.shape[0], self._bias.shape[2]
        if self.is_full:
            capacity = min(max(self._max_steps), max(2 * capacity, _FIRST_CAPACITY))
        # Documents that come one by one: doubled, so that not each of them copies all others.
        most_documents = max(self.num_documents, min(2 * most_documents, self.num_documents + 8))
        self._resize(most_documents, capacity)

    def _resize(self, most_documents: int, capacity: int) -> None:
        b = self.rows_per_document
        self._bias = _resized(self._bias, (most_documents, b, capacity, b), -torch.inf)
        for store in (self._keys, self._values):
            for layer, tensor in enumerate(store):
                _, heads, _, head_dim = tensor.shape
                store[layer] = _resized(
                    tensor, (most_documents, heads, capacity * b, head_dim), 0.0
                )


def _resized(old: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
    """Return a tensor of this shape that begins as the old one does in every dimension."""
    new = old.new_full(shape, fill)
    both = tuple(slice(min(sizes)) for sizes in zip(old.shape, shape, strict=True))
    new[both] = old[both]
    return new
