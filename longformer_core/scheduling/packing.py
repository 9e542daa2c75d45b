"""From requests to the description of the packed batch that a model reads."""

from collections.abc import Sequence

import torch

from longformer_core.layout import Layout, default_global_positions
from longformer_core.scheduling.handle import DocumentRequest


def packed_layout(requests: Sequence[DocumentRequest], device: torch.device) -> Layout:
    """Describe the documents of these requests end to end.

    Global positions that a request leaves open are the package's default.
    """
    lengths = [len(request.input_ids) for request in requests]
    valid = None
    if any(request.valid is not None for request in requests):
        flags = [
            torch.ones(length, dtype=torch.bool)
            if request.valid is None
            else torch.as_tensor(request.valid, dtype=torch.bool)
            for request, length in zip(requests, lengths, strict=True)
        ]
        valid = torch.cat(flags)
    positions = [
        default_global_positions(length)
        if request.global_positions is None
        else request.global_positions
        for request, length in zip(requests, lengths, strict=True)
    ]
    return Layout.from_lengths(lengths, positions, valid, device=device)
