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
    """Read all weights of one `tf_model.h5`, or of one of its shards, onto the CPU.

    Raises: CheckpointError as `open_h5` does, and when the file holds anything but numbers.
    """
    tensors: dict[str, Tensor] = {}
    with open_h5(path) as file:
        # A whole model lies in Keras' own layout, layer/model/part/.../leaf:0; a shard leaves out
        # layer and model. Keras says which version of it wrote a file.
        outer = 2 if "keras_version" in file.attrs else 0

        def keep(address: str, item: Any) -> None:
            if not hasattr(item, "shape"):
                return  # a group
            *parts, leaf = address.removesuffix(":0").split("/")
            value = torch.from_numpy(item[()])
            name = ".".join([*parts[outer:], _LEAVES.get(leaf, leaf)])
            # Layers of Longformer are called `layer_._0`.
            name = re.sub(r"_\._(\d+)", r".\1", name)
            tensors[name] = value.T.contiguous() if leaf == "kernel" else value

        try:
            file.visititems(keep)
        except (OSError, TypeError) as error:
            raise CheckpointError(
                f"{path} does not hold weights as TensorFlow writes them: {error}"
            ) from error
    return tensors
