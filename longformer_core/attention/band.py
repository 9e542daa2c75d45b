"""Which keys a query sees for their distance alone.

Shape letters: H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from longformer_core.errors import ShapeError


@dataclass(frozen=True)
class Band:
    """The window of every head: `radius` keys either side of a query, `dilation` apart.

    Query i sees key j iff i - j is a multiple of the head's dilation, at most `radius` of them, and
    with `is_causal` not negative.
    Units: `radius` counts keys, `dilations` [H] tokens.
    Source: Longformer, arXiv:2004.05150, section 3.1.
    """

    radius: int
    dilations: tuple[int, ...]
    is_causal: bool = False

    @classmethod
    def of(
        cls, radius: int, num_heads: int, dilation: int | Sequence[int] = 1, *, causal: bool = False
    ) -> "Band":
        """Return the band of so many heads; `dilation` is one number for all or one for each.

        Raises: ShapeError when a number is below 1 or there are not as many as heads.
        """
        if radius < 1:
            raise ShapeError(f"radius is {radius}; a token sees at least 1 token either side")
        one = isinstance(dilation, int)
        dilations = (dilation,) * num_heads if isinstance(dilation, int) else tuple(dilation)
        if len(dilations) != num_heads or any(d < 1 for d in dilations):
            raise ShapeError(
                f"dilation is {dilation if one else list(dilations)} for {num_heads} heads; give "
                "one whole number of 1 or more, or one for each head"
            )
        return cls(radius, dilations, causal)

    @property
    def is_plain(self) -> bool:
        """Return whether all heads see every token up to `radius` either side."""
        return not self.is_causal and set(self.dilations) <= {1}

    def sees(self, distance: Tensor, dilation: int) -> Tensor:
        """Return, bool, whether keys at `distance` (query minus key) are in a head's window."""
        near = (distance.abs() <= self.radius * dilation) & (distance % dilation == 0)
        return near & (distance >= 0) if self.is_causal else near
