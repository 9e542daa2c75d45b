"""Which search a set of options asks for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.search.base import Search
from longformer_core.generation.search.beam import BeamSearch
from longformer_core.generation.search.prompt_lookup import LookupSearch
from longformer_core.generation.search.sampling import RowSearch


def start_search(
    options: Sequence[GenerationConfig],
    sources: Sequence[Tensor],
    seeds: Sequence[int | None],
    device: torch.device,
) -> Search:
    """Begin to decode documents, each row holding the decoder's start token.

    options: one per document; they may differ in their lengths.
    sources: the documents' tokens, one int64 tensor each.
    seeds: one per document, for sampling; None draws a fresh one.
    """
    search: type[Search] = BeamSearch if options[0].num_beams > 1 else RowSearch
    if options[0].prompt_lookup_num_tokens is not None:
        search = LookupSearch
    return search(options, sources, seeds, device)
