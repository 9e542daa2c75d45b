"""sentence-transformers' files: how the states of a text's tokens become one vector."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from longformer_core.errors import CheckpointError

Mode = Literal["mean", "cls", "max"]
_MODES = ("mean", "cls", "max")
# The flags of older releases, whose newer name is one `pooling_mode`.
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Pooling(NamedTuple):
    """What a directory says of its vectors.

    mode: the mean of the states of a text's tokens, special ones included, the first token's state,
    or the maximum of each number. normalize: to length 1. max_length: tokens the model was trained
    for, special ones included; None where nothing is said. lower_case: texts become lower case
    before they are tokenized.
    """

    mode: Mode
    normalize: bool
    max_length: int | None
    lower_case: bool


def read_pooling(directory: str | Path) -> Pooling | None:
    """Read `modules.json` and what it names; None where a directory has no such file.

    Raises: CheckpointError for damaged files, for modules other than a transformer, one pooling and
        a normalization after it, and for poolings other than mean, cls and max.
    """
    path = Path(directory)
    if not (path / "modules.json").is_file():
        return None
    try:
        kinds = _kinds(path / "modules.json")
        folder = path / kinds["Pooling"]
        mode = _mode(folder / "config.json")
        limits = _read(path / "sentence_bert_config.json", {})
        length = limits.get("max_seq_length")
        return Pooling(
            mode=mode,
            normalize="Normalize" in kinds,
            max_length=None if length is None else int(length),
            lower_case=bool(limits.get("do_lower_case", False)),
        )
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"modules.json of {path}, or a file that it names, is damaged: {error!r}; copy the "
            "files again"
        ) from error


def _read(file: Path, default: Any) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else default


def _kinds(file: Path) -> dict[str, str]:
    """Return the folder of each kind of module, in their order."""
    modules = [(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in _read(file, [])]
    names = [name for name, _ in modules]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(
            f"{file} names {', '.join(names) or 'no module'}; what can be computed is Transformer, "
            "Pooling and, after them, Normalize"
        )
    return dict(modules)


def _mode(file: Path) -> Mode:
    settings = _read(file, {})
    named = settings.get("pooling_mode")
    if named is None:
        named = [mode for flag, mode in _FLAGS.items() if settings.get(flag)]
    modes = [named] if isinstance(named, str) else list(named)
    if len(modes) != 1 or modes[0] not in _MODES:
        raise CheckpointError(
            f"{file} pools by {', '.join(map(str, modes)) or 'nothing'}; what can be computed is "
            f"one of {', '.join(_MODES)}"
        )
    return cast(Mode, modes[0])
