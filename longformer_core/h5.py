"""Weights that the published TensorFlow classes wrote, under the names and shapes of PyTorch."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longformer_core.errors import CheckpointError

# Keras names the last part of a weight by its layer's kind.
_LEAVES = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "beta": "bias"}


def open_h5(path: Path) -> Any:
    """Open a `tf_model.h5`, which also shows whether the file was cut short; the caller closes it.

    Raises: CheckpointError when the file is damaged, or when h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise CheckpointError(
            f"{path} needs the h5py package; install longhaul[h5], or convert the file elsewhere"
        ) from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy it again") from error


def read_h5(path: Path) -> dict[str, Tensor]:
    """Read all weights of one `tf_model.h5` onto the CPU.

    Raises: CheckpointError as `open_h5` does, and when the file holds anything but numbers.
    """
    tensors: dict[str, Tensor] = {}

    def keep(address: str, item: Any) -> None:
        if not hasattr(item, "shape"):
            return  # a group
        name, is_kernel = _torch_name(address)
        value = torch.from_numpy(item[()])
        tensors[name] = value.T.contiguous() if is_kernel else value

    with open_h5(path) as file:
        try:
            file.visititems(keep)
        except (OSError, TypeError) as error:
            raise CheckpointError(
                f"{path} does not hold weights as TensorFlow writes them: {error}"
            ) from error
    return tensors


def _torch_name(address: str) -> tuple[str, bool]:
    """Return the name of the weight at an address, and whether it is a transposed matrix.

    An address is group/model/part/.../leaf:0. Weights that belong to the whole model lie in a group
    of their own, without the model's name.
    """
    *parts, leaf = address.removesuffix(":0").split("/")
    name = ".".join([*parts[2:], _LEAVES.get(leaf, leaf)])
    return re.sub(r"_\._(\d+)", r".\1", name), leaf == "kernel"
