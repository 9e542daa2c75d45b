"""The published classes as the oracle: the same weights on both sides, and their distance."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import longformer_core

VOCAB, PAD, SEP = 60, 1, 2


def pair(folder: Path, name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    """The published class with random weights and ours, loaded from the directory that it wrote."""
    torch.manual_seed(5)
    family = "LED" if name.startswith("LED") else "Longformer"
    options = getattr(transformers, f"{family}Config")(**config)
    published = getattr(transformers, name)(options).eval()
    with torch.no_grad():
        for parameter in published.parameters():
            if parameter.dim() == 1:  # biases and norms are drawn as zeros and ones
                parameter.add_(torch.randn_like(parameter) * 0.2)
    published.save_pretrained(folder)
    return published, getattr(longformer_core, name).from_pretrained(folder)


def difference(ours: Tensor, oracle: Tensor) -> float:
    """The L2 norm of the difference over the L2 norm of the oracle."""
    mine, theirs = ours.detach().double(), oracle.detach().double()
    assert mine.shape == theirs.shape
    return float((mine - theirs).norm() / theirs.norm().clamp(min=1e-30))


def compare_fields(ours: Any, oracle: Any, limit: float = 1e-5) -> None:
    """All fields are there on both sides, in one order, and equal."""
    assert ours.keys() == list(oracle.keys())
    for key, theirs in oracle.items():
        mine = ours[key]
        if key == "past_key_values":
            continue
        tensors = zip(mine, theirs, strict=True) if isinstance(theirs, tuple) else [(mine, theirs)]
        for index, (a, b) in enumerate(tensors):
            assert difference(a, b) <= limit, (key, index)


def compare_gradients(ours: nn.Module, published: nn.Module) -> None:
    """After a backward pass on both sides; every parameter of ours has a gradient."""
    theirs = {k: p.grad for k, p in published.named_parameters() if p.grad is not None}
    mine = dict(ours.named_parameters())
    largest = max(float(grad.norm()) for grad in theirs.values())
    compared = 0
    for key, parameter in mine.items():
        grad, oracle = parameter.grad, theirs.get(key)
        assert grad is not None, key
        if oracle is None or oracle.norm() < 1e-6 * largest:
            # Zero in exact arithmetic, as the gradient of all that adds one constant to every
            # score of a softmax, or in no sum at all.
            assert grad.norm() <= 1e-5 * largest, key
            continue
        assert difference(grad, oracle) <= 1e-4, key
        compared += 1
    assert compared > 40
    assert theirs.keys() <= mine.keys()


def batch(lengths: tuple[int, ...] = (50, 3, 90, 17), seed: int = 0) -> dict[str, Tensor]:
    """Padded ids, the padding masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, VOCAB, (length,), generator=generator)
    return {"input_ids": ids, "attention_mask": ids.ne(PAD).long()}
