"""Model directories: the files they hold, and what is wrong with them, without loading weights."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from longformer_core.checkpoints.tensorflow import open_h5
from longformer_core.config import LEDConfig
from longformer_core.config.base import read_json
from longformer_core.errors import CheckpointError, ConfigError, TokenizerError
from longformer_core.hub import SMALL_FILES
from longformer_core.tokenization.tokenizer import LEDTokenizer

# In the order in which they are looked for, as published readers do.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "tf_model.h5.index.json",
)


def list_model_files(directory: str | Path) -> list[Path]:
    """Return the files that can change a result, sorted: weights in use, configs, tokenizer.

    Weights that are present but would not be read (a `pytorch_model.bin` beside safetensors) are
    left out.
    Raises: CheckpointError when there are no weights, or the index names missing shards.
    """
    path = Path(directory)
    small = [path / name for name in SMALL_FILES if (path / name).is_file()]
    weights = weight_file(path)
    index = [weights] if weights.suffix == ".json" else []
    return sorted(small + index + shards(weights))


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
        for shard in shards(weight_file(path)):
            if shard.suffix == ".safetensors":
                _check_header(shard)
            elif shard.suffix == ".h5":
                open_h5(shard).close()
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


def weight_file(directory: Path) -> Path:
    for name in _WEIGHT_FILES:
        if (directory / name).is_file():
            return directory / name
    training = sorted(directory.glob("*.ckpt"))
    if len(training) == 1:
        return training[0]
    raise CheckpointError(
        f"{directory} has no weights; it must hold one of {', '.join(_WEIGHT_FILES)}, or a single "
        f"training checkpoint *.ckpt (there are {len(training)})"
    )


def shards(weights: Path) -> list[Path]:
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
