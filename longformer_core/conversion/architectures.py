"""What published model types are made of, and which long model each of them can become.

Tables, and what is read off a `config.json` by them: names of weights, fields that must hold one
value because the long model knows no other, rows of position tables that no token uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.config.base import read_json
from longformer_core.errors import ConfigError, did_you_mean

# Pattern and replacement, applied in turn to the name of each weight.
Renames = tuple[tuple[str, str], ...]
# Field, the only value that can be converted, and why.
Demands = tuple[tuple[str, Any, str], ...]

_ENCODER_NAMES: Renames = (
    # The names of layer norms in the first published weights.
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"^(?:bert\.|roberta\.|longformer\.)?(embeddings|encoder|pooler)\.", r"longformer.\1."),
)
_BERT_LM_NAMES: Renames = (
    (r"^cls\.predictions\.transform\.LayerNorm\.", "lm_head.layer_norm."),
    (r"^cls\.predictions\.transform\.", "lm_head."),
    (r"^cls\.predictions\.", "lm_head."),
)
# BERT classifies the pooled first token, which is Longformer's classification head in two parts.
_BERT_CLASSIFIER_NAMES: Renames = (
    (r"^classifier\.(weight|bias)$", r"classifier.out_proj.\1"),
    (r"^longformer\.pooler\.", "classifier."),
)
_BART_NAMES: Renames = (
    (r"^(?:model\.|led\.)?(shared|encoder|decoder)\.", r"led.\1."),
    (r"^(led\.encoder\.layers\.\d+\.self_attn\.)q_proj\.", r"\1longformer_self_attn.query."),
    (r"^(led\.encoder\.layers\.\d+\.self_attn\.)k_proj\.", r"\1longformer_self_attn.key."),
    (r"^(led\.encoder\.layers\.\d+\.self_attn\.)v_proj\.", r"\1longformer_self_attn.value."),
    (r"^(led\.encoder\.layers\.\d+\.self_attn\.)out_proj\.", r"\1output."),
)

_ENCODER_DEMANDS: Demands = (
    ("position_embedding_type", "absolute", "Longformer has absolute positions only"),
    ("is_decoder", False, "Longformer looks both ways"),
    ("add_cross_attention", False, "Longformer has no cross-attention"),
)
_BART_DEMANDS: Demands = (
    ("normalize_before", False, "LED normalises after each sublayer"),
    ("add_final_layer_norm", False, "LED has no layer norm after its last layer"),
    ("normalize_embedding", True, "LED always normalises the embeddings"),
    ("static_position_embeddings", False, "LED learns its positions"),
    ("is_decoder", False, "LED has an encoder"),
)
_GELU_HEAD: Demands = (("hidden_act", "gelu", "Longformer's masked-LM head is always gelu"),)

# Model types that look convertible and are not.
_REFUSED = {
    "mbart": "it normalises before each sublayer and once more after the last one, where LED "
    "normalises after each",
    "pegasus": "it normalises before each sublayer, and LED after it",
    "roberta-prelayernorm": "it normalises before each sublayer, and Longformer after it",
}


@dataclass(frozen=True)
class Head:
    """The class that a published class becomes, and what is special about its weights."""

    target: str
    renames: Renames = ()
    demands: Demands = ()


@dataclass(frozen=True)
class Architecture:
    """How one published `model_type` is laid out, and what it becomes.

    heads: by published class; empty when every class stays what it is. offset: rows of a position
    table before the first token's; None stands for Longformer's way, pad_token_id + 1 of them, and
    the config counts them among its positions. defaults: of config.json, where they are not those
    of the long model. sizes: tokens of a document and two-sided window of the published long model.
    """

    heads: Mapping[str, Head]
    tokenizer: str
    renames: Renames
    demands: Demands = ()
    offset: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int] = (4096, 512)

    @property
    def is_long(self) -> bool:
        """Tell whether this is a long model already."""
        return not self.heads

    def head(self, values: Mapping[str, Any]) -> tuple[str, Head]:
        """Return the class that config.json names, and what becomes of it.

        Raises: ConfigError for a class without a match, and for a field that must hold another
            value.
        """
        name = str(next(iter(values.get("architectures") or ()), None))
        if not self.is_long and name not in self.heads:
            raise ConfigError(
                f"architectures names {name}; what can be converted is {', '.join(self.heads)}"
            )
        head = self.heads.get(name, Head(name))
        for key, needed, why in (*self.demands, *head.demands):
            if values.get(key, needed) != needed:
                raise ConfigError(
                    f"{key} is {values[key]!r}; only {needed!r} can be converted: {why}"
                )
        return name, head


_ENCODER_CLASSES = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


def _heads(name: str) -> dict[str, Head]:
    return {f"{name}{part}": Head(f"Longformer{part}") for part in _ENCODER_CLASSES}


def _roberta(name: str) -> Architecture:
    return Architecture(_heads(name), f"{name}Tokenizer", _ENCODER_NAMES, _ENCODER_DEMANDS)


_BERT_LM = Head("LongformerForMaskedLM", _BERT_LM_NAMES, _GELU_HEAD)
ARCHITECTURES = {
    "bert": Architecture(
        {
            **_heads("Bert"),
            "BertForMaskedLM": _BERT_LM,
            "BertForPreTraining": _BERT_LM,
            "BertForSequenceClassification": Head(
                "LongformerForSequenceClassification", _BERT_CLASSIFIER_NAMES
            ),
        },
        "BertTokenizer",
        _ENCODER_NAMES,
        _ENCODER_DEMANDS,
        offset=0,
        defaults={"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
    ),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "camembert": _roberta("Camembert"),
    "longformer": Architecture({}, "LongformerTokenizer", _ENCODER_NAMES),
    "bart": Architecture(
        {
            "BartForConditionalGeneration": Head("LEDForConditionalGeneration"),
            "BartModel": Head("LEDForConditionalGeneration"),
        },
        "BartTokenizer",
        _BART_NAMES,
        _BART_DEMANDS,
        offset=2,
        sizes=(16384, 1024),
        defaults={"max_position_embeddings": 1024, "forced_eos_token_id": 2},
    ),
    "led": Architecture({}, "LEDTokenizer", _BART_NAMES, offset=0),
}


def published_values(source: Path) -> dict[str, Any]:
    """Return config.json of a model of a known architecture, with its defaults filled in.

    Raises: ConfigError for a model_type that cannot be converted, with the reason.
    """
    values = read_json(source / "config.json")
    kind = values.get("model_type")
    if kind in _REFUSED:
        raise ConfigError(f"model_type {kind!r} cannot be converted: {_REFUSED[kind]}")
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"model_type is {kind!r}{did_you_mean(str(kind), ARCHITECTURES)}; "
            f"what can be converted is {', '.join(ARCHITECTURES)}"
        )
    values = {**ARCHITECTURES[kind].defaults, **values}
    if kind not in ("bart", "led") and values.get("pad_token_id", 1) is None:
        raise ConfigError("pad_token_id is None; Longformer counts positions from it, so name one")
    if kind == "bert":
        values["sep_token_id"] = _separator(source)
    return values


def unused_rows(values: Mapping[str, Any]) -> int:
    """Return the rows of the position table before the first token's."""
    offset = ARCHITECTURES[values["model_type"]].offset
    return int(values.get("pad_token_id", 1)) + 1 if offset is None else offset


def num_positions(values: Mapping[str, Any]) -> int:
    """Return the most tokens of a document."""
    if values["model_type"] == "led":
        return LEDConfig.from_dict(values).max_encoder_position_embeddings
    rows = int(values.get("max_position_embeddings", 512))
    return (
        rows
        if ARCHITECTURES[values["model_type"]].offset is not None
        else rows - unused_rows(values)
    )


def scales_embeddings(values: Mapping[str, Any]) -> bool:
    """Tell whether the embeddings are multiplied by the root of their size when they are read."""
    return values["model_type"] == "bart" and bool(values.get("scale_embedding", False))


def long_config(
    values: Mapping[str, Any], length: int, window: int | list[int]
) -> LongformerConfig | LEDConfig:
    """Return the long model's config; its other fields are the short one's."""
    model_type = values["model_type"]
    dropped = [name for name, _, _ in (*_ENCODER_DEMANDS, *_BART_DEMANDS)]
    dropped += ["scale_embedding", "max_position_embeddings", "attention_window"]
    kept = {name: value for name, value in values.items() if name not in dropped}
    kept["attention_window"] = window
    if model_type not in ("bart", "led"):
        kept["max_position_embeddings"] = length + kept.get("pad_token_id", 1) + 1
        return LongformerConfig.from_dict({**kept, "model_type": "longformer"})
    kept["max_encoder_position_embeddings"] = length
    if model_type == "bart":
        kept["max_decoder_position_embeddings"] = values["max_position_embeddings"]
        if scales_embeddings(values):
            kept["tie_word_embeddings"] = False
    return LEDConfig.from_dict({**kept, "model_type": "led"})


def _separator(source: Path) -> int | None:
    """Return the id of BERT's [SEP], which its config.json does not tell and Longformer's does."""
    if (source / "tokenizer.json").is_file():
        added = read_json(source / "tokenizer.json").get("added_tokens") or []
        return next((token["id"] for token in added if token["content"] == "[SEP]"), None)
    if (source / "vocab.txt").is_file():
        words = (source / "vocab.txt").read_text(encoding="utf-8").split("\n")
        return words.index("[SEP]") if "[SEP]" in words else None
    return None
