"""Encoders in both libraries with the same weights, real documents, and an encoder that fails."""

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longformer_core.config import LongformerConfig
from longformer_core.encoding.request import Encoding
from longformer_core.layout import Layout
from longformer_core.models.longformer import LongformerForSequenceClassification
from longformer_core.tokenization.tokenizer import LEDTokenizerFast
from tests.helpers import corpus_texts, tokenizer_directory

BOS, PAD, SEP = 0, 1, 2
PATIENCE_S = 120.0
VOCAB = 60
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 130,
    "type_vocab_size": 2,
    "attention_window": [8, 16],
    # With the default of 0.02 the attention is uniform and no comparison could see it.
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "sep_token_id": SEP,
}


def real_documents(lengths: list[int], *, pairs: bool = False) -> tuple[list[list[int]], int]:
    """Return token ids of real texts cut to these lengths, and the size of their vocabulary.

    pairs: a question of some tokens in front, `<s> question </s></s> document </s>`.
    """
    tokenizer = LEDTokenizerFast.from_pretrained(tokenizer_directory())
    texts = corpus_texts(len(lengths), min_tokens=300)
    rows = tokenizer([text[:20_000] for text in texts])["input_ids"]
    documents = []
    for row, length in zip(rows, lengths, strict=True):
        body = row[1 : length - 1]
        assert len(body) == max(0, length - 2)
        if pairs:
            cut = max(1, length // 5)
            body = [*body[:cut], SEP, SEP, *body[cut : length - 4]]
        documents.append([BOS, *body, SEP][:length])
    return documents, len(tokenizer)


def padded(documents: list[list[int]]) -> dict[str, Tensor]:
    """Return ids and attention mask of the published call."""
    ids = torch.full((len(documents), max(map(len, documents))), PAD)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        mask[row, : len(document)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def documents(seed: int, *lengths: int) -> list[list[int]]:
    """Random documents in the published frame, <s> ... </s>."""
    pick = random.Random(seed)
    return [[BOS, *pick.choices(range(4, VOCAB), k=max(0, n - 2)), SEP][:n] for n in lengths]


def classifier(seed: int = 0) -> LongformerForSequenceClassification:
    torch.manual_seed(seed)
    return LongformerForSequenceClassification(LongformerConfig(**SMALL)).eval()


class Watched:
    """A model whose packs are recorded, and which fails as told. Only what the engine calls."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.packs: list[list[list[int]]] = []
        self.poison: dict[int, Exception] = {}
        self.max_tokens = 10**9
        self.before_pack: list[Callable[[], None]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, input_ids: Tensor, layout: Layout, **types: Tensor) -> Tensor:
        tokens = input_ids.tolist()
        self.packs.append([tokens[a:b] for a, b in itertools.pairwise(layout.cu_seqlens)])
        for action in self.before_pack:
            action()
        for token, error in self.poison.items():
            if token in tokens:
                raise error
        if len(tokens) > self.max_tokens:
            raise torch.OutOfMemoryError("no room to encode")
        states: Tensor = self._model.encode(input_ids, layout, **types)
        return states


def hold_at(model: Watched, pack: int) -> tuple[threading.Event, threading.Event]:
    """Let the engine wait in a pack, from 1: return what says it is there, and the way on."""
    is_there, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        if len(model.packs) == pack:
            is_there.set()
            assert go_on.wait(PATIENCE_S)

    model.before_pack.append(wait)
    return is_there, go_on


def logits(outcome: Encoding) -> Tensor:
    assert outcome.error is None, outcome.error
    assert outcome.logits is not None
    return outcome.logits
