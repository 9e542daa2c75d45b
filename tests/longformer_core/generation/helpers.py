"""A tiny LED in both libraries, and the published library's decoding as the oracle."""

import functools
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from longformer_core.config import LEDConfig
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine
from longformer_core.generation.request import Generation, Request
from longformer_core.layout import Layout
from longformer_core.models.led import LEDForConditionalGeneration
from tests.helpers import TINY

VOCAB = 120
SIZES: dict[str, Any] = {
    **TINY,
    "vocab_size": VOCAB,
    "max_encoder_position_embeddings": 128,
    "max_decoder_position_embeddings": 40,
}
Document = list[int]


@functools.cache
def models(
    seed: int, vocab_size: int = VOCAB, **sizes: int
) -> tuple[LEDForConditionalGeneration, transformers.LEDForConditionalGeneration]:
    """One random model in both libraries, of `SIZES` but for those given.

    Its decoder is balanced by hand so that texts vary with source and position, and mostly end.
    """
    torch.manual_seed(seed)
    given = SIZES | {"vocab_size": vocab_size} | sizes
    ours = LEDForConditionalGeneration(LEDConfig(**given)).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        ours.led.decoder.embed_positions.weight *= 4
        for layer in ours.led.decoder.layers:
            layer.self_attn.out_proj.weight *= 0.3
            layer.encoder_attn.q_proj.weight *= 2
            layer.encoder_attn.out_proj.weight *= 0.8
            layer.fc2.weight *= 0.3
        ours.final_logits_bias[0, 2] = 3.0
    theirs = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**given)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.tie_weights()
    theirs.generation_config = transformers.GenerationConfig(
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2
    )
    return ours, theirs


def documents(seed: int, *lengths: int) -> list[Document]:
    """Random documents in the published frame, <s> ... </s>."""
    pick = random.Random(seed)
    return [[0, *pick.choices(range(4, VOCAB), k=max(0, n - 2)), 2][:n] for n in lengths]


def decode(
    model: LEDForConditionalGeneration,
    texts: list[Document],
    options: dict[str, Any],
    *,
    batch_tokens: int = 10_000,
    max_rows: int = 256,
    seeds: list[int] | None = None,
    positions: list[list[int]] | None = None,
) -> list[Generation]:
    """Decode with the engine; the outcomes in the order of the texts."""
    engine = Engine(model, batch_tokens=batch_tokens, max_rows=max_rows)
    chosen = GenerationConfig(**options)
    requests = [
        Request(
            text,
            chosen,
            None if positions is None else positions[i],
            seed=None if seeds is None else seeds[i],
        )
        for i, text in enumerate(texts)
    ]
    outcomes = dict(engine.run(requests))
    assert sorted(outcomes) == list(range(len(texts)))
    return [outcomes[i] for i in range(len(texts))]


def published(
    model: transformers.LEDForConditionalGeneration,
    texts: list[Document],
    options: dict[str, Any],
    *,
    positions: list[list[int]] | None = None,
    **arguments: Any,
) -> tuple[list[list[Document]], list[list[float]]]:
    """Decode with the published library: right-padded, padding cut again.

    Without `positions` the first token is global. `arguments` are those of its `generate` alone.
    """
    ids = torch.full((len(texts), max(map(len, texts))), 1)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    is_global = torch.zeros_like(ids)
    for row in range(len(texts)):
        is_global[row, [0] if positions is None else positions[row]] = 1
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, global_attention_mask=is_global, **options,
            return_dict_in_generate=True, output_scores=True, **arguments,
        )  # fmt: skip
    ends = GenerationConfig(**options).eos_token_ids
    rows = [_cut(row, ends) for row in out.sequences.tolist()]
    num = options.get("num_return_sequences", 1)
    scores: Tensor | None = getattr(out, "sequences_scores", None)
    return (
        [rows[i : i + num] for i in range(0, len(rows), num)],
        [] if scores is None else scores.view(-1, num).tolist(),
    )


def published_scores(
    model: transformers.LEDForConditionalGeneration,
    options: dict[str, Any],
    sources: Tensor,
    tokens: Tensor,
    scores: Tensor,
) -> Tensor:
    """What the published processors make of the scores [rows, V] after `tokens` [rows, length]."""
    allowed = options.get("prefix_allowed_tokens_fn")
    options = {name: v for name, v in options.items() if name != "prefix_allowed_tokens_fn"}
    config, _ = model._prepare_generation_config(None, **options)
    model._prepare_special_tokens(config, device=torch.device("cpu"))
    config = model._prepare_generated_length(config, False, True, "input_ids", 1, sources)
    processors = model._get_logits_processor(
        config, input_ids_seq_length=1, encoder_input_ids=sources, device="cpu",
        prefix_allowed_tokens_fn=allowed,
    )  # fmt: skip
    return processors(tokens, scores.clone())


def _cut(row: Document, ends: tuple[int, ...]) -> Document:
    """Drop the start token and everything after the first end token."""
    row = row[1:]
    first = min((row.index(end) for end in ends if end in row), default=len(row))
    return row[: first + 1]


def wait_until(is_true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, f"not true after {timeout_s} s"
        time.sleep(0.01)


class Watched:
    """A model whose calls are recorded, and which fails as told. Only what the engine calls."""

    def __init__(self, model: LEDForConditionalGeneration) -> None:
        self._model = model
        self.encoded: list[list[Document]] = []
        self.rows: list[int] = []
        self.poison: dict[int, Exception] = {}
        self.max_tokens = 10**9
        self.max_rows = 10**9
        self.before_step: list[Callable[[], None]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, input_ids: Tensor, layout: Layout) -> Tensor:
        tokens = input_ids.tolist()
        self.encoded.append(
            [tokens[a:b] for a, b in itertools.pairwise(layout.cu_seqlens)],
        )
        for token, error in self.poison.items():
            if token in tokens:
                raise error
        if len(tokens) > self.max_tokens:
            raise torch.OutOfMemoryError("no room to encode")
        return self._model.encode(input_ids, layout)

    def decode_step(self, token_ids: Tensor, *rest: Any) -> Tensor:
        self.rows.append(len(token_ids))
        for action in self.before_step:
            action()
        # Late, so that some documents have ended and others have histories to lose.
        if len(token_ids) > self.max_rows and rest[0].max() > 4:
            raise MemoryError("no room to decode")
        return self._model.decode_step(token_ids, *rest)


def watch(seed: int) -> Any:
    return Watched(models(seed)[0])
