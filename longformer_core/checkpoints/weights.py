"""Model directories: check them, read and write their weights.

A directory holds `config.json`, weights and tokenizer files under their published names. Weights
are read from safetensors, from `pytorch_model.bin` or a training program's only `.ckpt` with
torch's tensors-only unpickler, or from `tf_model.h5`; nothing in a directory is ever executed.
"""

import logging
import os
import pickle
import re
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longformer_core.checkpoints.ai2 import published_weights
from longformer_core.checkpoints.directory import shards, weight_file
from longformer_core.checkpoints.tensorflow import read_h5
from longformer_core.errors import CheckpointError
from longformer_core.hub import resolve

__all__ = [
    "load_into",
    "read_state_dict",
    "resolve",
    "write_state_dict",
]

_logger = logging.getLogger(__name__)

# What checkpoints hold that a model may do without: buffers that are computed now, and the pooler,
# which RoBERTa's first classes kept beside every head.
_UNUSED = re.compile(r"(^|\.)(embeddings\.position_ids|pooler\.dense\.(weight|bias))$")


def read_state_dict(directory: str | Path) -> dict[str, Tensor]:
    """Read all weights of a directory onto the CPU, in the dtype they are stored in.

    Names are those of the files; TensorFlow's are told as PyTorch's.
    Raises: CheckpointError when weights are missing or damaged, or hold anything but tensors.
    """
    tensors: dict[str, Tensor] = {}
    for shard in shards(weight_file(Path(directory))):
        tensors.update(_READERS.get(shard.suffix, _read_pickle)(shard))
    return tensors


def load_into(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    optional: Iterable[str] = (),
    base: str = "",
    draw: Callable[[str], Tensor] | None = None,
    allow_new_head: bool = False,
) -> None:
    """Give a module all its weights, in the module's own dtype and on its device.

    Names under which the module holds one and the same parameter are tied: any of them in
    `state_dict` serves all. Weights named in `optional` become zeros when absent. A module on the
    meta device takes over the given tensors instead of copying them (on their device).

    base: the attribute in which a model with a head keeps the model without. With it, weights of a
        model with a head are understood by one without and the other way round, and so are those
        of the original release; heads that the module does not have are left out.
    draw: returns a fresh value for the module's weight of a name. A model without a head takes one
        for its pooler, which few checkpoints hold.
    allow_new_head: draw also what of a head is missing or misshapen.
    The log tells in one line what was drawn (a warning) and left out.
    Raises: CheckpointError that lists every missing, unexpected and misshapen weight; the module is
        unchanged then.
    """
    # All is compared under the names of a model with a head, whose own have no prefix to lose.
    prefix = f"{base}." if base and not hasattr(module, base) else ""
    groups = [[prefix + name for name in names] for names in _tied_groups(module)]
    given = _modern_names(state_dict, {name for names in groups for name in names}, base)
    chosen: dict[str, Tensor] = {}
    problems: list[_Problem] = []
    for names in groups:
        own = names[0].removeprefix(prefix)
        target = _named(module, own)
        found = [name for name in names if name in given]
        misfits = _misfits(names[0], found, given, target.shape)
        if misfits:
            problems += misfits
        elif found:
            chosen[own] = given[found[0]]
        elif own in optional:
            chosen[own] = torch.zeros(target.shape, dtype=target.dtype)
        else:
            problems.append(_Problem(names[0], "missing", names[0]))
    unexpected = sorted(set(given).difference(*groups))
    problems += [_Problem(name, "unexpected", name) for name in unexpected]
    _refuse(
        [p for p in problems if not (base and _is_allowed(p, base, bool(prefix), allow_new_head))],
        problems,
        base,
    )
    for names in groups:
        first, *_ = own_names = [name.removeprefix(prefix) for name in names]
        if first not in chosen:
            assert draw is not None
            chosen[first] = draw(first)
        _assign(module, own_names, chosen[first])
    if problems:
        is_drawn = any(problem.kind != "unexpected" for problem in problems)
        _logger.log(
            logging.WARNING if is_drawn else logging.INFO,
            "%s: what is missing or not fitting was drawn at random and needs training, what is "
            "unexpected was left out; %s",
            type(module).__name__,
            _describe(problems),
        )


def write_state_dict(module: nn.Module, directory: str | Path) -> None:
    """Write `model.safetensors` as published readers expect it: tied weights once, by first name.

    The file appears whole or not at all.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        names[0]: _named(module, names[0]).detach().to("cpu").contiguous()
        for names in _tied_groups(module)
    }
    handle, part = tempfile.mkstemp(prefix=".model.", suffix=".part", dir=path)
    os.close(handle)
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        os.chmod(part, 0o644)
        os.replace(part, path / "model.safetensors")
    finally:
        Path(part).unlink(missing_ok=True)


def _tied_groups(module: nn.Module) -> list[list[str]]:
    """Return the state-dict names of each distinct parameter or buffer, in the module's order."""
    groups: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _named(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def _assign(module: nn.Module, names: list[str], value: Tensor) -> None:
    target = _named(module, names[0])
    if target.device.type != "meta":
        with torch.no_grad():
            target.copy_(value)
        return
    value = value.to(target.dtype)
    if isinstance(target, nn.Parameter):
        value = nn.Parameter(value, requires_grad=target.requires_grad)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, value)


def _modern_names(
    state_dict: Mapping[str, Tensor], expected: set[str], base: str
) -> dict[str, Tensor]:
    """Return weights under the names of a model with a head, without those no longer stored."""
    given = {}
    weights = published_weights(state_dict, base) if base else state_dict
    has_head = not base or any(name.startswith(f"{base}.") for name in weights)
    for old, tensor in weights.items():
        name = old if has_head else f"{base}.{old}"
        stem, _, leaf = name.rpartition(".")
        modern = f"{stem}.{ {'gamma': 'weight', 'beta': 'bias'}.get(leaf, leaf) }"
        if name not in expected and modern in expected:
            given[modern] = tensor
        elif name in expected or not _UNUSED.search(name):
            given[name] = tensor
    return given


class _Problem(NamedTuple):
    """What does not fit: the first name of the weight, which of three kinds it is, and details."""

    weight: str
    kind: str
    text: str


def _misfits(
    weight: str, names: list[str], given: Mapping[str, Tensor], shape: torch.Size
) -> list[_Problem]:
    """Return what of the tensors given for one weight has another shape, or another value."""
    problems = [
        _Problem(weight, "not fitting", f"{name} is {list(found)}, the model needs {list(shape)}")
        for name in names
        if (found := given[name].shape) != shape
    ]
    return problems + [
        _Problem(weight, "not fitting", f"{name} differs from {names[0]}, which it is tied to")
        for name in names[1:]
        if given[name].shape == (first := given[names[0]]).shape
        and given[name].data_ptr() != first.data_ptr()
        and not torch.equal(given[name], first)
    ]


def _is_head(name: str, base: str) -> bool:
    """Tell whether a weight lies outside the base model; the pooler, which few heads use, does."""
    return not name.startswith(f"{base}.") or name.startswith(f"{base}.pooler.")


def _is_allowed(problem: _Problem, base: str, is_base: bool, allow_new_head: bool) -> bool:
    """Tell whether a model loads in spite of a problem; `is_base`: it has no head itself."""
    if not _is_head(problem.weight, base):
        return False
    is_pooler = problem.kind == "missing" and problem.weight.startswith(f"{base}.pooler.")
    return allow_new_head or problem.kind == "unexpected" or (is_base and is_pooler)


def _refuse(refused: list[_Problem], problems: list[_Problem], base: str) -> None:
    if not refused:
        return
    if base and all(_is_head(problem.weight, base) for problem in refused):
        # What is left out otherwise may be the missing head under another name.
        refused = problems
        remedy = "only the head differs: load with allow_new_head=True to train another"
    else:
        remedy = "check that config.json belongs to these weights"
    raise CheckpointError(f"the weights do not fit the model; {_describe(refused)}; {remedy}")


def _describe(problems: list[_Problem]) -> str:
    parts = []
    for kind in ("missing", "unexpected", "not fitting"):
        texts = [problem.text for problem in problems if problem.kind == kind]
        if texts:
            parts.append(f"{len(texts)} {kind}: {', '.join(texts)}")
    return "; ".join(parts)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy it again") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # Training programs keep their command line beside the weights, as a plain Namespace. Files
        # older than torch 1.6 are not archives and cannot be mapped into memory.
        with torch.serialization.safe_globals([Namespace]):
            tensors = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as plain tensors: {error}; if you trust it, convert it to "
            "model.safetensors elsewhere"
        ) from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} must hold a dictionary of tensors by name, nothing else")
    return dict(tensors)


# By suffix; anything else is a pickle.
_READERS = {".safetensors": _read_safetensors, ".h5": read_h5}
