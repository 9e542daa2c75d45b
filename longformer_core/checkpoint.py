"""Model directories: check them, read and write their weights.

A directory holds `config.json`, weights and tokenizer files under their published names. Weights
are read from safetensors, or from `pytorch_model.bin` with torch's tensors-only unpickler; nothing
in a directory is ever executed.
"""

import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longformer_core.config import LEDConfig, read_json
from longformer_core.errors import CheckpointError, ConfigError, TokenizerError
from longformer_core.location import SMALL_FILES, resolve
from longformer_core.tokenizer import LEDTokenizer

__all__ = [
    "check_directory",
    "list_model_files",
    "load_into",
    "read_state_dict",
    "resolve",
    "write_state_dict",
]

# In the order in which they are looked for, as published readers do.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Buffers of old checkpoints that are computed now.
_LEGACY = re.compile(r"(^|\.)embeddings\.position_ids$")


def list_model_files(directory: str | Path) -> list[Path]:
    """Return the files that can change a result, sorted: weights in use, configs, tokenizer.

    Weights that are present but would not be read (a `pytorch_model.bin` beside safetensors) are
    left out.
    Raises: CheckpointError when there are no weights, or the index names missing shards.
    """
    path = Path(directory)
    small = [path / name for name in SMALL_FILES if (path / name).is_file()]
    weights = _weight_file(path)
    index = [weights] if weights.suffix == ".json" else []
    return sorted(small + index + _shards(weights))


def check_directory(directory: str | Path) -> list[str]:
    """Return what is wrong with a model directory, without loading its weights; empty when fine."""
    path = Path(directory)
    if not path.is_dir():
        return [f"{path} is not a directory; give the directory that holds config.json"]
    problems: list[str] = []
    config: LEDConfig | None = None
    try:
        config = LEDConfig.from_pretrained(path)
    except ConfigError as error:
        problems.append(str(error))
    try:
        for shard in _shards(_weight_file(path)):
            if shard.suffix == ".safetensors":
                _check_header(shard)
            elif not shard.stat().st_size:
                problems.append(f"{shard} is empty; copy it again")
    except CheckpointError as error:
        problems.append(str(error))
    try:
        tokens = len(LEDTokenizer.from_pretrained(path))
        if config is not None and tokens > config.vocab_size:
            problems.append(
                f"the tokenizer of {path} has {tokens} ids and the model only vocab_size "
                f"{config.vocab_size}; take the tokenizer that belongs to the model"
            )
    except TokenizerError as error:
        problems.append(str(error))
    return problems


def read_state_dict(directory: str | Path) -> dict[str, Tensor]:
    """Read all weights of a directory onto the CPU, in the dtype they are stored in.

    Raises: CheckpointError when weights are missing or damaged, or hold anything but tensors.
    """
    tensors: dict[str, Tensor] = {}
    for shard in _shards(_weight_file(Path(directory))):
        tensors.update(
            _read_safetensors(shard) if shard.suffix == ".safetensors" else _read_pickle(shard)
        )
    return tensors


def load_into(
    module: nn.Module, state_dict: Mapping[str, Tensor], *, optional: Iterable[str] = ()
) -> None:
    """Give a module all its weights, in the module's own dtype and on its device.

    Names under which the module holds one and the same parameter are tied: any of them in
    `state_dict` serves all. Weights named in `optional` become zeros when absent. A module on the
    meta device takes over the given tensors instead of copying them (on their device).
    Raises: CheckpointError that lists every missing, unexpected and misshapen weight; the module is
    unchanged then.
    """
    groups = _tied_groups(module)
    given = _modern_names(state_dict, {name for names in groups for name in names})
    chosen: dict[str, Tensor] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    for names in groups:
        target = _named(module, names[0])
        found = [name for name in names if name in given]
        if not found and names[0] in optional:
            chosen[names[0]] = torch.zeros(target.shape, dtype=target.dtype)
            continue
        if not found:
            missing.append(names[0])
            continue
        misshapen += [
            f"{name} is {list(given[name].shape)}, the model needs {list(target.shape)}"
            for name in found
            if given[name].shape != target.shape
        ]
        chosen[names[0]] = given[found[0]]
        misshapen += _disagreements(given, found)
    unexpected = sorted(set(given) - {name for names in groups for name in names})
    if missing or unexpected or misshapen:
        raise CheckpointError(_describe(missing, unexpected, misshapen))
    for names in groups:
        _assign(module, names, chosen[names[0]])


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


def _modern_names(state_dict: Mapping[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Rename LayerNorm's gamma and beta of old checkpoints, and drop buffers no longer stored."""
    given = {}
    for name, tensor in state_dict.items():
        stem, _, leaf = name.rpartition(".")
        modern = f"{stem}.{ {'gamma': 'weight', 'beta': 'bias'}.get(leaf, leaf) }"
        if name not in expected and modern in expected:
            given[modern] = tensor
        elif name in expected or not _LEGACY.search(name):
            given[name] = tensor
    return given


def _disagreements(given: Mapping[str, Tensor], names: list[str]) -> list[str]:
    first = given[names[0]]
    return [
        f"{name} differs from {names[0]}, which the model ties it to"
        for name in names[1:]
        if given[name].shape == first.shape
        and given[name].data_ptr() != first.data_ptr()
        and not torch.equal(given[name], first)
    ]


def _describe(missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    parts = [
        f"{len(names)} {what}: {', '.join(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("not fitting", misshapen),
        )
        if names
    ]
    return (
        f"the weights do not fit the model; {'; '.join(parts)}; "
        "check that config.json belongs to these weights"
    )


def _weight_file(directory: Path) -> Path:
    for name in _WEIGHT_FILES:
        if (directory / name).is_file():
            return directory / name
    raise CheckpointError(
        f"{directory} has no weights; it must hold one of {', '.join(_WEIGHT_FILES)}"
    )


def _shards(weights: Path) -> list[Path]:
    """Return the files that hold tensors: the one given, or those that an index names."""
    if weights.suffix != ".json":
        return [weights]
    try:
        names = sorted(set(read_json(weights)["weight_map"].values()))
    except (ConfigError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{weights} is not an index of shards: {error}") from error
    odd = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if odd or not names:
        raise CheckpointError(f"{weights} must name files of its own directory, not {odd}")
    missing = [name for name in names if not (weights.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{weights.parent} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}; "
            "copy them beside the index"
        )
    return [weights.parent / name for name in names]


def _check_header(path: Path) -> None:
    """Read the header of a safetensors file, which also shows whether the file was cut short."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy it again") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy it again") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # Files older than torch 1.6 are not archives and cannot be mapped into memory.
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as plain tensors: {error}; if you trust it, convert it to "
            "model.safetensors elsewhere"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} must hold a dictionary of tensors by name, nothing else")
    return dict(tensors)
