"""How far it is from a model's call to what computes: the files and calls of ours on the way.

    python -m tests.paths

Prints, for a one-layer Longformer, every file of ours that the first forward pass enters up to the
operator of window attention, and the deepest stack of our calls there. Only calls of our own
sources count, not those of torch between them.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from longformer_core import LongformerConfig, LongformerModel

ROOT = Path(__file__).parents[1]
CORE = ROOT / "longformer_core"


@dataclass
class Way:
    """The files entered, in their order, and the calls that were open when the operator began."""

    files: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    has_arrived: bool = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Note a call; given to `sys.setprofile`."""
        if event != "call" or self.has_arrived or not _is_ours(frame.f_code):
            return
        name = str(Path(frame.f_code.co_filename).relative_to(ROOT))
        if name not in self.files:
            self.files.append(name)
        if frame.f_code.co_name == "_attend" and "attention" in name:
            self.has_arrived = True
            self.calls = _stack(frame)


def _is_ours(code: CodeType) -> bool:
    return Path(code.co_filename).is_relative_to(CORE)


def _stack(frame: FrameType | None) -> list[str]:
    """Return our open calls, outermost first; the operator's own is left out."""
    calls: list[str] = []
    frame = frame.f_back if frame else None
    while frame is not None:
        if _is_ours(frame.f_code):
            file = Path(frame.f_code.co_filename).relative_to(ROOT)
            calls.append(f"{file}:{frame.f_code.co_qualname}")
        frame = frame.f_back
    return calls[::-1]


def way_to_attention() -> Way:
    """Return the way of a second forward pass; the first one imports and caches."""
    config = LongformerConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        attention_window=[8],
    )
    model = LongformerModel(config).eval()
    ids = torch.arange(4, 24)[None]
    way = Way()
    with torch.no_grad():
        model(ids)
        sys.setprofile(way)
        try:
            model(ids)
        finally:
            sys.setprofile(None)
    assert way.has_arrived
    return way


def main() -> None:
    """Print the way."""
    way = way_to_attention()
    print(f"{len(way.files)} files of ours:", *way.files, sep="\n  ")
    print(f"{len(way.calls)} calls deep:", *way.calls, sep="\n  ")


if __name__ == "__main__":
    main()
