"""Longformer and LED on packed batches: models, attention, generation, tokenizer, directories.

Pure PyTorch; runs on a CPU, needs neither Ray nor Arrow. A name is loaded when it is first asked
for: a process that only tokenizes never pays for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longformer_core.attention.dense import dense_probabilities
    from longformer_core.attention.window import window_attention
    from longformer_core.batch_encoding import BatchEncoding
    from longformer_core.checkpoint import check_directory, list_model_files
    from longformer_core.config import LEDConfig, LongformerConfig
    from longformer_core.convert import (
        Conversion,
        convert_directory,
        copy_global_projections,
        plan_conversion,
    )
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
    from longformer_core.estimate import Estimate, estimate_cost
    from longformer_core.generation.config import GenerationConfig
    from longformer_core.generation.engine import Engine, Generation, Request
    from longformer_core.global_tokens import (
        mark_choice,
        mark_first_token,
        mark_question,
        mark_spans,
    )
    from longformer_core.layout import Layout, default_global_positions
    from longformer_core.location import resolve
    from longformer_core.models.attention_maps import attention_dense
    from longformer_core.models.led import (
        LEDForConditionalGeneration,
        LEDForQuestionAnswering,
        LEDForSequenceClassification,
        LEDModel,
    )
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
    "Conversion",
    "Engine",
    "Estimate",
    "Generation",
    "GenerationConfig",
    "LEDConfig",
    "LEDForConditionalGeneration",
    "LEDForQuestionAnswering",
    "LEDForSequenceClassification",
    "LEDModel",
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
    "attention_dense",
    "check_directory",
    "convert_directory",
    "copy_global_projections",
    "default_global_positions",
    "dense_probabilities",
    "estimate_cost",
    "list_model_files",
    "mark_choice",
    "mark_first_token",
    "mark_question",
    "mark_spans",
    "plan_conversion",
    "resolve",
    "window_attention",
]

_HOME = {
    "BatchEncoding": "batch_encoding",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "Conversion": "convert",
    "Engine": "generation.engine",
    "Estimate": "estimate",
    "Generation": "generation.engine",
    "GenerationConfig": "generation.config",
    "LEDConfig": "config",
    "LEDForConditionalGeneration": "models.led",
    "LEDForQuestionAnswering": "models.led",
    "LEDForSequenceClassification": "models.led",
    "LEDModel": "models.led",
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
    "attention_dense": "models.attention_maps",
    "check_directory": "checkpoint",
    "convert_directory": "convert",
    "copy_global_projections": "convert",
    "default_global_positions": "layout",
    "dense_probabilities": "attention.dense",
    "estimate_cost": "estimate",
    "list_model_files": "checkpoint",
    "mark_choice": "global_tokens",
    "mark_first_token": "global_tokens",
    "mark_question": "global_tokens",
    "mark_spans": "global_tokens",
    "plan_conversion": "convert",
    "resolve": "location",
    "window_attention": "attention.window",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longformer_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"longformer_core.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
