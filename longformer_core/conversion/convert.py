"""Long models made of short ones: BERT and RoBERTa to Longformer, BART to LED, more positions.

A conversion is planned from `config.json` alone, so that everything it cannot keep is refused
before a weight is read. What the long model lacks is copied: position embeddings are repeated, and
each global projection starts as the local one. On documents that no window cuts, the converted
model computes what the original does; beyond that it wants training.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longformer_core.checkpoints.meta_init import meta_init
from longformer_core.checkpoints.weights import load_into, read_state_dict, resolve
from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.config.base import read_json
from longformer_core.conversion.architectures import (
    ARCHITECTURES,
    Head,
    Renames,
    long_config,
    num_positions,
    published_values,
    scales_embeddings,
    unused_rows,
)
from longformer_core.errors import CheckpointError, ConfigError, NonFiniteError
from longformer_core.hub import SMALL_FILES
from longformer_core.layout import Layout
from longformer_core.models import led, led_heads, longformer
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.models.pretrained import PretrainedModel
from longformer_core.models.self_attention import LongformerSelfAttention

# Tokenizer and pooling.
_COPIED_FILES = [n for n in SMALL_FILES if n not in ("config.json", "generation_config.json")]

_PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True)
class Conversion:
    """What becomes of a model directory; `write` makes it so.

    config: of the result. old_length, new_length: the most tokens of a document, before and after.
    exact_length: up to so many tokens, special ones included, the result computes what the original
    does; beyond, its windows cut or its positions are copies. notes: what a user should know of the
    result, a sentence each. unused_rows: of the original's position tables, before the first
    token's. embedding_scale: what the original multiplies its embeddings by when it reads them.
    """

    source: Path
    model_type: str
    source_class: str
    target_class: str
    config: LongformerConfig | LEDConfig
    old_length: int
    new_length: int
    exact_length: int
    notes: tuple[str, ...]
    unused_rows: int
    embedding_scale: float

    def write(self, output: str | Path) -> list[str]:
        """Write the converted directory; return the weights that it has no use for, by name.

        The directory appears whole, loaded and tried (see `try_model`), or not at all.
        Raises: CheckpointError when the output holds something already, and when the weights do
            not fit config.json; NonFiniteError when the weights are damaged.
        """
        path = Path(output)
        check_output(path)
        model, left_out = self._model()
        part = path.with_name(f".{path.name}.part-{os.getpid()}")
        part.mkdir(parents=True)
        try:
            model.save_pretrained(part)
            _copy_small_files(self, part)
            try_model(part)
            os.replace(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return left_out

    def _model(self) -> tuple[PretrainedModel[Any], list[str]]:
        weights = _renamed(read_state_dict(self.source), self._renames())
        _lengthen(self, weights)
        if self.embedding_scale != 1.0:
            _fold_scale(weights, self.embedding_scale)
        _add_global_projections(weights)
        dtype = next(t.dtype for name, t in weights.items() if name.endswith("query.weight"))
        with meta_init():
            model = model_class(self.target_class)(self.config).to(dtype)
        wanted = model.state_dict()
        kept = {name: tensor for name, tensor in weights.items() if name in wanted}
        load_into(model, kept, optional=type(model)._optional_weights)
        return model, sorted(set(weights) - set(kept))

    def _renames(self) -> Renames:
        architecture = ARCHITECTURES[self.model_type]
        head = architecture.heads.get(self.source_class, Head(self.target_class))
        # Only a bare model's weights have no prefix.
        bare = ((r"^longformer\.", ""),) if self.target_class == "LongformerModel" else ()
        return architecture.renames + head.renames + bare


def plan_conversion(
    model: str | Path, *, max_length: int | None = None, attention_window: int | None = None
) -> Conversion:
    """Say what a directory, hub id or URL of a model becomes; no weight is read.

    BERT, RoBERTa, XLM-R and CamemBERT become Longformer, BART becomes LED, and Longformer and LED
    stay what they are, with more positions or other windows.
    Units: max_length in tokens of a document, at least what the model has (default: 4096 for
        Longformer, 16384 for LED; a model that is long already keeps its own); attention_window
        two-sided in tokens (default: 512, 1024, or the model's own).
    Raises: ConfigError that names the field of config.json that the long model has no match for.
    """
    source = resolve(model)
    values = published_values(source)
    architecture = ARCHITECTURES[values["model_type"]]
    source_class, head = architecture.head(values)
    model_class(head.target)
    old = num_positions(values)
    length, window = architecture.sizes
    if architecture.is_long:
        length, window = old, values.get("attention_window", window)
        if max_length is None and attention_window is None:
            raise ConfigError(
                f"{source} holds a long model already; name a greater max_length or another "
                "attention_window"
            )
    new = max_length or max(length, old)
    if new < old:
        raise ConfigError(
            f"max_length {new} is less than the {old} tokens that the model takes already; "
            "documents may always be shorter, so leave the positions as they are"
        )
    config = long_config(values, new, attention_window or window)
    return Conversion(
        source=source,
        model_type=values["model_type"],
        source_class=source_class,
        target_class=head.target,
        config=config,
        old_length=old,
        new_length=new,
        exact_length=_exact_length(values, old, config),
        notes=tuple(_notes(values, old, new, config)),
        unused_rows=unused_rows(values),
        embedding_scale=math.sqrt(config.hidden_size) if scales_embeddings(values) else 1.0,
    )


def convert_directory(
    model: str | Path,
    output: str | Path,
    *,
    max_length: int | None = None,
    attention_window: int | None = None,
) -> Conversion:
    """Make a Longformer or LED directory of a short model's, or one with more positions.

    See `plan_conversion` for what is converted, `Conversion.write` for how.
    """
    plan = plan_conversion(model, max_length=max_length, attention_window=attention_window)
    plan.write(output)
    return plan


@torch.no_grad()
def copy_global_projections(model: nn.Module) -> int:
    """Set every global projection of a model to the local one, in place; return the layers done.

    Worth repeating after masked-LM training without global tokens, which trains the local ones
    only.
    Raises: ConfigError for a model without Longformer's self-attention.
    Source: the converters of AI2's repository of arXiv:2004.05150 begin and end so.
    """
    layers = [module for module in model.modules() if isinstance(module, LongformerSelfAttention)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no global projections; give a long model")
    for layer in layers:
        for name in _PROJECTIONS:
            local = getattr(layer, name).state_dict()
            getattr(layer, f"{name}_global").load_state_dict(local)
    return len(layers)


def repeat_positions(rows: Tensor, length: int) -> Tensor:
    """Return position embeddings [length, d]: `rows` [n, d] again and again, the last time in part.

    Source: arXiv:2004.05150, section 5, where copies beat new random positions by far.
    """
    return rows[torch.arange(length) % len(rows)]


def check_output(path: Path) -> None:
    """Raise CheckpointError unless a new directory can be written there."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise CheckpointError(f"{path} exists and is not an empty directory; choose a new one")


@torch.inference_mode()
def try_model(directory: str | Path) -> None:
    """Load a Longformer or LED directory completely and run a few tokens through it.

    Raises: CheckpointError when weights are missing or do not fit, NonFiniteError when a weight or
        a state is not a finite number.
    """
    path = Path(directory)
    name = read_json(path / "config.json")["architectures"][0]
    model = model_class(name).from_pretrained(path)
    ids = torch.arange(min(8, model.config.vocab_size))
    if isinstance(model, LEDForConditionalGeneration):
        states = model.encode(ids, Layout.from_lengths([len(ids)], [[0]]))
    else:
        marks = (ids == 0).long()[None]
        states = getattr(model, "longformer", model)(
            ids[None], global_attention_mask=marks
        ).last_hidden_state
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad or not states.isfinite().all():
        raise NonFiniteError(
            f"{path}: not all numbers are finite, in {', '.join(bad) or 'the states'}; "
            "the original's weights may be damaged"
        )


def model_class(name: str) -> type[PretrainedModel[Any]]:
    """Return the class of this package with a published name.

    Raises: ConfigError when there is none.
    """
    homes = (longformer, led, led_heads)
    found = next((getattr(home, name) for home in homes if hasattr(home, name)), None)
    if isinstance(found, type) and issubclass(found, PretrainedModel):
        return found
    raise ConfigError(f"there is no model class {name!r} here; choose a directory of another class")


def _exact_length(values: Mapping[str, Any], old: int, config: LongformerConfig | LEDConfig) -> int:
    """Return the most tokens of a document that no window cuts which the original did not have."""
    radii = set(config.radii)
    if ARCHITECTURES[values["model_type"]].is_long:
        before = type(config).from_dict(dict(values)).radii
        changed = [pair for pair in zip(before, config.radii, strict=True) if len(set(pair)) > 1]
        radii = {radius for pair in changed for radius in pair}
    # A token sees `radius` others on either side.
    return min([old, *(radius + 1 for radius in radii)])


def _notes(
    values: Mapping[str, Any], old: int, new: int, config: LongformerConfig | LEDConfig
) -> Iterator[str]:
    kind, window = values["model_type"], 2 * max(config.radii)
    if new > old:
        yield f"the {old} positions are repeated up to {new}; train before you trust the new ones"
    if not ARCHITECTURES[kind].is_long:
        yield "each global projection is a copy of the local one"
    if isinstance(config, LEDConfig) and new % window:
        yield (
            f"plain transformers pads to a multiple of the window, {window}, and so takes at most "
            f"{new // window * window} tokens of these {new}"
        )
    if kind == "bert":
        yield "the tokenizer stays BERT's WordPiece, which load_tokenizer reads"
        if values["sep_token_id"] is None:
            yield "no tokenizer file tells the id of [SEP]; question answering needs sep_token_id"
    if scales_embeddings(values):
        yield "scale_embedding is multiplied into the embeddings; lm_head keeps the unscaled ones"


def _renamed(weights: Mapping[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    """Return the weights by new names: every rule is applied in turn."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _lengthen(plan: Conversion, weights: dict[str, Tensor]) -> None:
    """Lay out the position tables as the long model does, the encoder's at its new length."""
    offset = plan.unused_rows
    if isinstance(plan.config, LEDConfig):
        table, new_offset = "led.encoder.embed_positions.weight", 0
        decoder = "led.decoder.embed_positions.weight"
        if decoder in weights:
            weights[decoder] = weights[decoder][offset:].clone()
    else:
        bare = plan.target_class == "LongformerModel"
        table = f"{'' if bare else 'longformer.'}embeddings.position_embeddings.weight"
        new_offset = (plan.config.pad_token_id or 0) + 1
    rows = weights.get(table, torch.empty(0, 0))
    if len(rows) != offset + plan.old_length:
        raise CheckpointError(
            f"{plan.source} has {len(rows)} rows of position embeddings but config.json tells of "
            f"{offset + plan.old_length}; check that it belongs to these weights"
        )
    unused = rows.new_zeros(new_offset, rows.shape[1])
    unused[:offset] = rows[: min(offset, new_offset)]
    weights[table] = torch.cat([unused, repeat_positions(rows[offset:], plan.new_length)])


def _fold_scale(weights: dict[str, Tensor], scale: float) -> None:
    """Multiply the embeddings by what BART multiplies them at run time; logits stay unscaled."""
    shared = weights["led.shared.weight"]
    weights.setdefault("lm_head.weight", shared)
    for name in ("led.encoder.embed_tokens.weight", "led.decoder.embed_tokens.weight"):
        weights[name] = weights.get(name, shared) * scale
    weights["led.shared.weight"] = shared * scale


def _add_global_projections(weights: dict[str, Tensor]) -> None:
    local = re.compile(r"(\.(?:self|longformer_self_attn)\.(?:query|key|value))\.(weight|bias)$")
    for name in list(weights):
        if local.search(name):
            weights.setdefault(local.sub(r"\1_global.\2", name), weights[name].clone())


def _copy_small_files(plan: Conversion, part: Path) -> None:
    names = [name for name in _COPIED_FILES if (plan.source / name).is_file()]
    generation = plan.source / "generation_config.json"
    if isinstance(plan.config, LEDConfig) and generation.is_file():
        shutil.copyfile(generation, part / generation.name)
    for name in names:
        (part / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(plan.source / name, part / name)
    # Published readers cut texts at model_max_length and max_seq_length, and would guess another
    # class from the new config.json.
    if names:
        settings = part / "tokenizer_config.json"
        values = read_json(settings) if settings.is_file() else {}
        values.setdefault("tokenizer_class", ARCHITECTURES[plan.model_type].tokenizer)
        _write_json(settings, {**values, "model_max_length": plan.new_length})
    pooling = part / "sentence_bert_config.json"
    if pooling.is_file():
        _write_json(pooling, {**read_json(pooling), "max_seq_length": plan.new_length})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
