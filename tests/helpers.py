"""What many tests need: a tiny LED directory, a vocabulary, and real long texts.

With LONGHAUL_TEST_DATA set to a folder that holds `tokenizer/`, `proposals/` and `qmsum/`, the
published vocabulary and real corpora are used; anywhere else, the standard library's own sources.
"""

import contextlib
import doctest
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longformer_core.attention.blocked import native
from longformer_core.config import LEDConfig
from longformer_core.ops import linear
from longformer_core.ops.cpu import decode, gemm
from longformer_core.tokenization.tokenizer import LEDTokenizer

TINY: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "attention_window": [8, 16],
    "max_encoder_position_embeddings": 4096,
    "max_decoder_position_embeddings": 128,
    # At the usual 0.02 an untrained model hardly looks at its source.
    "init_std": 0.3,
}
# Large enough that a model's own work outweighs what stands around it.
MEDIUM: dict[str, Any] = {
    "d_model": 256,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
# The published sizes of allenai/longformer-base-4096, led-base-16384 and led-large-16384.
LONGFORMER_BASE: dict[str, Any] = {
    "vocab_size": 50265,
    "max_position_embeddings": 4098,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "attention_window": [512] * 12,
}
LED_BASE: dict[str, Any] = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "attention_window": [1024] * 6,
}
LED_LARGE: dict[str, Any] = {
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "attention_window": [1024] * 12,
}
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def data_folder() -> Path | None:
    """Return the folder of real corpora, or None where there is none."""
    folder = os.environ.get("LONGHAUL_TEST_DATA", "")
    return Path(folder) if folder and Path(folder).is_dir() else None


def make_led_directory(
    path: Path,
    *,
    seed: int = 0,
    tokenizer: Path | None = None,
    generation: dict[str, Any] | None = None,
    **config_overrides: Any,
) -> Path:
    """Write a seeded tiny LED model as a published directory, and return it.

    `tokenizer` is a folder with vocab.json and merges.txt (default `tokenizer_directory()`),
    `generation` adds to generation_config.json, `config_overrides` replace values of `TINY`.
    """
    path.mkdir(parents=True, exist_ok=True)
    source = tokenizer or tokenizer_directory()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(source / name, path / name)
    vocab_size = len(LEDTokenizer.from_pretrained(path))
    config = LEDConfig(**{"vocab_size": vocab_size, **TINY, **config_overrides})
    config.save_pretrained(path, architecture="LEDForConditionalGeneration", dtype="float32")
    save_file(led_weights(config, seed), path / "model.safetensors", metadata={"format": "pt"})
    defaults = {
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "max_length": 24,
        "num_beams": 2,
        "no_repeat_ngram_size": 3,
        "early_stopping": True,
    }
    text = json.dumps({**defaults, **(generation or {})}, indent=2, sort_keys=True)
    (path / "generation_config.json").write_text(text, encoding="utf-8")
    return path


def led_weights(config: LEDConfig, seed: int = 0) -> dict[str, Tensor]:
    """Draw every weight of an LED under its published name, tied copies left out.

    Biases and layer norms are drawn too: zeros and ones would hide a weight that is never used.
    """
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in _led_shapes(config):
        noise = torch.randn(shape, generator=draw)
        is_norm = "layer_norm" in name or "layernorm" in name
        if is_norm:
            weights[name] = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        else:
            weights[name] = noise * (config.init_std if name.endswith("weight") else 0.1)
    return weights


def _led_shapes(config: LEDConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    d = config.d_model
    yield "final_logits_bias", (1, config.vocab_size)
    yield "led.shared.weight", (config.vocab_size, d)
    sides = (
        ("encoder", config.encoder_layers, config.encoder_ffn_dim),
        ("decoder", config.decoder_layers, config.decoder_ffn_dim),
    )
    for side, num_layers, ffn in sides:
        positions = getattr(config, f"max_{side}_position_embeddings")
        yield f"led.{side}.embed_positions.weight", (positions, d)
        yield f"led.{side}.layernorm_embedding.weight", (d,)
        yield f"led.{side}.layernorm_embedding.bias", (d,)
        for layer in range(num_layers):
            for name, rows, columns in _layer_shapes(side, d, ffn):
                stem = f"led.{side}.layers.{layer}.{name}"
                yield f"{stem}.weight", (rows, columns) if columns else (rows,)
                yield f"{stem}.bias", (rows,)


def _layer_shapes(side: str, d: int, ffn: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, rows and columns of the modules of one layer; no columns for layer norms."""
    if side == "encoder":
        for name in ("query", "key", "value", "query_global", "key_global", "value_global"):
            yield f"self_attn.longformer_self_attn.{name}", d, d
        yield "self_attn.output", d, d
    else:
        for block in ("self_attn", "encoder_attn"):
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield f"{block}.{name}", d, d
        yield "encoder_attn_layer_norm", d, 0
    yield "self_attn_layer_norm", d, 0
    yield "fc1", ffn, d
    yield "fc2", d, ffn
    yield "final_layer_norm", d, 0


def tokenizer_directory() -> Path:
    """Return a folder with vocab.json and merges.txt: the published ones where they are at hand."""
    data = data_folder()
    if data is not None and (data / "tokenizer" / "vocab.json").is_file():
        return data / "tokenizer"
    return trained_tokenizer_directory()


@functools.cache
def trained_tokenizer_directory() -> Path:
    """Train a byte-level BPE in the published layout on the standard library, once per process."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text[:50_000] for text in _library_sources()[:20]), trainer)
    folder = Path(tempfile.mkdtemp(prefix="longhaul-vocabulary-"))
    backend.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab["<mask>"] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return folder


def corpus_texts(n: int, min_tokens: int = 1) -> list[str]:
    """Return `n` different real texts of at least `min_tokens` words (and so tokens) each."""
    texts = [text for text in all_texts() if len(text.split()) >= min_tokens]
    if len(texts) < n:
        raise ValueError(f"{len(texts)} texts have {min_tokens} words; {n} were asked for")
    return texts[:n]


def run_example(of: Any) -> None:
    """Run the example in a docstring, and hold what it prints against what it says."""
    (example,) = doctest.DocTestFinder(recurse=False).find(of, of.__name__, globs={})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as on CPUs that the compiled kernels do not run on."""
    for user in (linear, decode, gemm, native):
        monkeypatch.setattr(user, "kernels", lambda: None)


@contextlib.contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Let torch compute with `n` threads in this block, whatever the process has otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def all_texts() -> tuple[str, ...]:
    """Return every different text of the two validation sets, or of the standard library."""
    data = data_folder()
    if data is None:
        return _library_sources()
    import pyarrow.parquet as pq

    texts: list[str] = []
    for folder in ("proposals", "qmsum"):
        for file in sorted((data / folder).glob("validation-*.parquet")):
            texts += pq.read_table(file, columns=["text"])["text"].to_pylist()
    return tuple(dict.fromkeys(texts)) or _library_sources()


@functools.cache
def _library_sources() -> tuple[str, ...]:
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return tuple(file.read_text(encoding="utf-8", errors="replace") for file in files)
