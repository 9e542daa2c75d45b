"""The two sides of the generation benchmarks: this package's engine and transformers' `generate`.

Every document has its own number of new tokens and can neither undercut nor exceed it, so that
both sides do the same work whatever an untrained model says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor

from longformer_core import LEDForConditionalGeneration
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine
from longformer_core.generation.request import Generation, Request
from tests.helpers import LED_BASE, LED_LARGE, TINY

_POSITIONS = {"max_encoder_position_embeddings": 16384, "max_decoder_position_embeddings": 1024}
# With weights as small as published models start with, all documents would read the same.
_DRAWN = {"init_std": 0.05}
# `tiny` says nothing of speed: it shows in seconds that a benchmark runs.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "base": LED_BASE | _POSITIONS | _DRAWN,
    "large": LED_LARGE | _POSITIONS | _DRAWN,
    "tiny": TINY | _POSITIONS,
}
# How far scores may be apart where two sequences are equally good and each side took another.
TIE = 1e-3
# In float32 this share of the documents must agree. Where candidates score the same in the middle
# of a search the last bit decides, which depends on how many rows are multiplied together, and a
# text of an untrained model that took another turn may end with another score.
MUST_AGREE = 0.95

Tokens = list[int]


@dataclass(frozen=True)
class Work:
    """Documents, and how each is decoded: `options`, with exactly as many tokens as its own."""

    documents: Sequence[Tokens]
    new_tokens: Sequence[int]
    options: GenerationConfig

    def of(self, indices: Sequence[int]) -> "Work":
        documents = [self.documents[index] for index in indices]
        return replace(
            self, documents=documents, new_tokens=[self.new_tokens[index] for index in indices]
        )

    def writing(self, new_tokens: Sequence[int]) -> "Work":
        return replace(self, new_tokens=new_tokens)

    def longest_first(self) -> list[int]:
        return sorted(range(len(self.documents)), key=lambda index: -len(self.documents[index]))


def engine_run(
    model: LEDForConditionalGeneration, work: Work, *, cuda_graphs: bool = True
) -> list[Generation]:
    """Decode all documents. The one place that knows how the engine is made and called."""
    engine = Engine(model, cuda_graphs=cuda_graphs)
    requests = [
        Request(ids, work.options.replace(max_new_tokens=count, min_new_tokens=count))
        for ids, count in zip(work.documents, work.new_tokens, strict=True)
    ]
    found = dict(engine.run(requests))
    for generation in found.values():
        if generation.error is not None:
            raise generation.error
    return [found[index] for index in range(len(requests))]


def generate_run(model: Any, work: Work, batch_size: int) -> list[Tokens]:
    """Decode by padded batches of similar length, each to the longest output of its documents."""
    outputs: dict[int, Tokens] = {}
    order = work.longest_first()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        options = _published(work.options, max(work.new_tokens[index] for index in batch))
        inputs = padded([work.documents[index] for index in batch], model.device)
        rows = model.generate(**inputs, generation_config=options)[:, 1:].tolist()
        for index, row in zip(batch, rows, strict=True):
            outputs[index] = row[: work.new_tokens[index]]
    return [outputs[index] for index in range(len(order))]


def generate_scored(model: Any, work: Work) -> list[tuple[Tokens, float]]:
    """Decode each document alone; return its tokens and its score as our engine defines it."""
    found = []
    for ids, count in zip(work.documents, work.new_tokens, strict=True):
        out = model.generate(
            **padded([ids], model.device),
            generation_config=_published(work.options, count),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        if work.options.num_beams > 1:
            score = float(out.sequences_scores[0])
        else:
            gained = model.compute_transition_scores(
                out.sequences, out.logits, normalize_logits=True
            )
            score = float(gained.sum()) / count**work.options.length_penalty
        found.append((out.sequences[0, 1:].tolist(), score))
    return found


def padded(documents: Sequence[Tokens], device: torch.device | str) -> dict[str, Tensor]:
    """Return the published inputs of a batch, the first token of each document global."""
    ids = torch.ones(len(documents), max(map(len, documents)), dtype=torch.int64)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document)
    seen = torch.arange(ids.shape[1]) < torch.tensor([[len(ids)] for ids in documents])
    marks = torch.zeros_like(ids)
    marks[:, 0] = 1
    inputs = {"input_ids": ids, "attention_mask": seen.long(), "global_attention_mask": marks}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def compare(
    model: LEDForConditionalGeneration,
    work: Work,
    ours: Sequence[Generation],
    theirs: Sequence[tuple[Tokens, float]],
    what: str,
    *,
    must_agree: bool,
) -> Mapping[str, float]:
    """Return which share of documents and of tokens agrees, and how far scores are apart at most.

    `model` decoded the documents of `work` together with others, `theirs` were decoded alone.
    Raises: AssertionError when they must agree and too many (see MUST_AGREE) have other tokens and
    another score, or one has other tokens when the model decodes it alone too.
    """
    equal_documents, equal_tokens, apart = 0, 0.0, 0.0
    differing = []
    for index, (mine, (tokens, score)) in enumerate(zip(ours, theirs, strict=True)):
        got = mine.sequences[0]
        difference = abs(mine.scores[0] - score) / max(abs(score), 1e-9)
        is_equal = got == tokens
        if not is_equal and difference > TIE:
            differing.append(f"{index} ({difference:.2g})")
            assert not must_agree or _alone(model, work, index) == tokens, (
                f"{what}: compared document {index} has other tokens, alone too, and a score "
                f"{difference:.2g} apart: no speed is printed"
            )
        equal_documents += is_equal
        same = sum(a == b for a, b in zip(got, tokens, strict=True))
        equal_tokens += same / len(tokens)
        apart = max(apart, difference)
    count = len(theirs)
    assert not must_agree or len(differing) <= (1 - MUST_AGREE) * count, (
        f"{what}: compared documents have other tokens and scores apart: {', '.join(differing)}: "
        "no speed is printed"
    )
    return {
        "compared_documents": count,
        "equal_documents": equal_documents / count,
        "equal_tokens": equal_tokens / count,
        "scores_apart": apart,
    }


def _alone(model: LEDForConditionalGeneration, work: Work, index: int) -> Tokens:
    return engine_run(model, work.of([index]))[0].sequences[0]


def _published(options: GenerationConfig, num_new: int) -> transformers.GenerationConfig:
    names = (
        "num_beams",
        "length_penalty",
        "early_stopping",
        "no_repeat_ngram_size",
        "decoder_start_token_id",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    given = options.to_dict()
    return transformers.GenerationConfig(
        **{name: given[name] for name in names},
        do_sample=False,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
    )
