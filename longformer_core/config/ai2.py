"""The original release of Longformer and LED, told in the names that were published later.

The first code counted attention windows on one side, kept RoBERTa's and BART's module names, and
let BART's position tables begin with rows that no token uses. It and the programs around it wrote
`config.json`, weights, and training checkpoints that wrap the weights once more.
Source: the code beside arXiv:2004.05150, before the models joined transformers.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longformer_core.errors import ConfigError

if TYPE_CHECKING:
    pass

# How the original code computed its window: exactly the band, or something else.
_BANDS = ("sliding_chunks", "sliding_chunks2", "tvm")
_OTHERS = {
    "n2": "dense attention, without a window",
    "sliding_chunks3": "attention to whole neighbouring chunks",
    "sliding_chunks_no_overlap": "attention to whole neighbouring chunks",
}
# The models that the original classes extended, and called themselves in `model_type`.
_ANCESTORS = {"longformer": "roberta", "led": "bart"}
# Switches of the original code and of BART's, and the only value that fits the published models.
# Both models counted positions from behind the padding token, whose id their code held fixed.
_REQUIRED = {
    "pad_token_id": 1,
    "autoregressive": False,
    "scale_embedding": False,
    "normalize_before": False,
    "add_final_layer_norm": False,
    "static_position_embeddings": False,
    "normalize_embedding": True,
}


def published_config(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return the content of a config.json as published later; any other file's is left as it is.

    Units: the original `attention_window` is one-sided, the returned one two-sided.
    Raises: ConfigError for what no published model does (dilation, causal or dense attention), and
        when the file says of itself both that it is original and that it is not.
    """
    mode = str(values.get("attention_mode"))
    if mode in _OTHERS:
        raise ConfigError(
            f"attention_mode {mode!r} of config.json means {_OTHERS[mode]}, which no published "
            f"model uses; only {', '.join(_BANDS)} can be read"
        )
    if mode not in _BANDS or model_type not in _ANCESTORS:
        return dict(values)
    ancestor = _ANCESTORS[model_type]
    if values.get("model_type", ancestor) == model_type:
        raise ConfigError(
            f"attention_mode {mode!r} belongs to the original release, whose windows are "
            f"one-sided, and model_type {model_type!r} to the published one, whose windows are "
            "two-sided; remove from config.json the one that does not hold"
        )
    _check_original(values, ancestor)
    dropped = {"attention_mode", "attention_dilation", "model_type", *_REQUIRED}
    if model_type == "led":
        dropped.add("max_position_embeddings")  # BART's; an encoder and a decoder have their own
    window = values["attention_window"]
    doubled = [2 * side for side in window] if isinstance(window, list) else 2 * window
    kept = {name: value for name, value in values.items() if name not in dropped}
    return {**kept, "attention_window": doubled}


def _check_original(values: Mapping[str, Any], ancestor: str) -> None:
    if values.get("model_type", ancestor) != ancestor:
        raise ConfigError(
            f"config.json describes a model of type {values['model_type']!r}; of the original "
            f"release only {ancestor!r} fits here; choose a directory that fits"
        )
    sides = values.get("attention_window")
    listed = sides if isinstance(sides, list) else [sides]
    if not listed or not all(isinstance(side, int) for side in listed):
        raise ConfigError(
            f"attention_window is {sides!r}; the original config.json gives the tokens on one side "
            "of each, one number or one per layer"
        )
    dilation = values.get("attention_dilation", 1)
    if any(step != 1 for step in (dilation if isinstance(dilation, list) else [dilation])):
        raise ConfigError(
            f"attention_dilation is {dilation!r}; only windows without dilation (1) can be read"
        )
    for name, required in _REQUIRED.items():
        if values.get(name, required) != required:
            raise ConfigError(f"{name} is {values[name]!r}; only {required!r} can be read")
