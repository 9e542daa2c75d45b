"""Longformer and LED on packed batches: models, attention, generation, tokenizer, directories.

Pure PyTorch; runs on a CPU, needs neither Ray nor Arrow. A name is loaded when it is first asked
for: a process that only tokenizes never pays for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longformer_core.attention.window import window_attention
    from longformer_core.batch_encoding import BatchEncoding
    from longformer_core.checkpoint import check_directory, list_model_files
    from longformer_core.config import LEDConfig, LongformerConfig
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
    from longformer_core.models.longformer import (
        LongformerForMaskedLM,
        LongformerForMultipleChoice,
        LongformerForQuestionAnswering,
        LongformerForSequenceClassification,
        LongformerForTokenClassification,
        LongformerModel,
    )
    from longformer_core.tokenizer import (
        LEDTokenizer,
        LEDTokenizerFast,
        LongformerTokenizer,
        LongformerTokenizerFast,
    )

__all__ = [
    "BatchEncoding",
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
    "LongformerConfig",
    "LongformerError",
    "LongformerForMaskedLM",
    "LongformerForMultipleChoice",
    "LongformerForQuestionAnswering",
    "LongformerForSequenceClassification",
    "LongformerForTokenClassification",
    "LongformerModel",
    "LongformerTokenizer",
    "LongformerTokenizerFast",
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

_HOME = {
    "BatchEncoding": "batch_encoding",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "Engine": "generation.engine",
    "Generation": "generation.engine",
    "GenerationConfig": "generation.config",
    "LEDConfig": "config",
    "LEDForConditionalGeneration": "models.led",
    "LEDTokenizer": "tokenizer",
    "LEDTokenizerFast": "tokenizer",
    "Layout": "layout",
    "LongformerConfig": "config",
    "LongformerError": "errors",
    "LongformerForMaskedLM": "models.longformer",
    "LongformerForMultipleChoice": "models.longformer",
    "LongformerForQuestionAnswering": "models.longformer",
    "LongformerForSequenceClassification": "models.longformer",
    "LongformerForTokenClassification": "models.longformer",
    "LongformerModel": "models.longformer",
    "LongformerTokenizer": "tokenizer",
    "LongformerTokenizerFast": "tokenizer",
    "NonFiniteError": "errors",
    "OutOfMemoryError": "errors",
    "Request": "generation.engine",
    "ShapeError": "errors",
    "TokenizerError": "errors",
    "TooLongError": "errors",
    "check_directory": "checkpoint",
    "default_global_positions": "layout",
    "list_model_files": "checkpoint",
    "resolve": "location",
    "window_attention": "attention.window",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longformer_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"longformer_core.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
