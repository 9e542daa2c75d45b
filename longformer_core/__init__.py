"""Longformer and LED on packed batches: models, attention, generation, tokenizer, directories.

Pure PyTorch; runs on a CPU, needs neither Ray nor Arrow, and does nothing at import but define.
"""

from longformer_core.attention.window import window_attention
from longformer_core.checkpoint import check_directory, list_model_files
from longformer_core.config import LEDConfig
from longformer_core.errors import (
    CheckpointError,
    ConfigError,
    LongformerError,
    NonFiniteError,
    OutOfMemoryError,
    ShapeError,
    TokenizerError,
    TooLongError,
)
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine, Generation, Request
from longformer_core.layout import Layout, default_global_positions
from longformer_core.location import resolve
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.tokenizer import LEDTokenizer, LEDTokenizerFast

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Engine",
    "Generation",
    "GenerationConfig",
    "LEDConfig",
    "LEDForConditionalGeneration",
    "LEDTokenizer",
    "LEDTokenizerFast",
    "Layout",
    "LongformerError",
    "NonFiniteError",
    "OutOfMemoryError",
    "Request",
    "ShapeError",
    "TokenizerError",
    "TooLongError",
    "check_directory",
    "default_global_positions",
    "list_model_files",
    "resolve",
    "window_attention",
]
