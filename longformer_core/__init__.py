"""Longformer and LED on packed batches: models, attention, generation, tokenizer, directories.

Pure PyTorch; runs on a CPU, needs neither Ray nor Arrow. A name is loaded when it is first asked
for: a process that only tokenizes never pays for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longformer_core.attention.dense import dense_probabilities
    from longformer_core.attention.window import window_attention, window_attention_with_lse
    from longformer_core.checkpoints.directory import check_directory, list_model_files
    from longformer_core.config import LEDConfig, LongformerCausalConfig, LongformerConfig
    from longformer_core.conversion.convert import (
        Conversion,
        convert_directory,
        copy_global_projections,
        plan_conversion,
    )
    from longformer_core.encoding.engine import EncodingEngine
    from longformer_core.encoding.request import Encoding, EncodingRequest
    from longformer_core.errors import (
        CancelledError,
        CheckpointError,
        ConfigError,
        DeadlineError,
        LongformerError,
        NonFiniteError,
        OutOfMemoryError,
        ShapeError,
        TokenizerError,
        TooLongError,
    )
    from longformer_core.estimate import Estimate, estimate_cost
    from longformer_core.generation.config import GenerationConfig
    from longformer_core.generation.engine import Engine
    from longformer_core.generation.request import Generation, Request
    from longformer_core.hub import resolve
    from longformer_core.layout import Layout, default_global_positions
    from longformer_core.models.attention_maps import attention_dense
    from longformer_core.models.global_attention_mask import (
        mark_choice,
        mark_first_token,
        mark_question,
        mark_spans,
    )
    from longformer_core.models.led import (
        LEDForConditionalGeneration,
        LEDModel,
        LEDPreTrainedModel,
    )
    from longformer_core.models.led_heads import (
        LEDForQuestionAnswering,
        LEDForSequenceClassification,
    )
    from longformer_core.models.longformer import (
        LongformerForMaskedLM,
        LongformerForMultipleChoice,
        LongformerForQuestionAnswering,
        LongformerForSequenceClassification,
        LongformerForTokenClassification,
        LongformerModel,
        LongformerPreTrainedModel,
    )
    from longformer_core.models.longformer_causal import LongformerForCausalLM
    from longformer_core.models.outputs import (
        LEDEncoderBaseModelOutput,
        LEDGenerateOutput,
        LEDSeq2SeqLMOutput,
        LEDSeq2SeqModelOutput,
        LEDSeq2SeqQuestionAnsweringModelOutput,
        LEDSeq2SeqSequenceClassifierOutput,
        LongformerBaseModelOutput,
        LongformerBaseModelOutputWithPooling,
        LongformerCausalLMOutput,
        LongformerMaskedLMOutput,
        LongformerMultipleChoiceModelOutput,
        LongformerQuestionAnsweringModelOutput,
        LongformerSequenceClassifierOutput,
        LongformerTokenClassifierOutput,
    )
    from longformer_core.scheduling.handle import Handle, Tokens
    from longformer_core.scheduling.scheduler import Load
    from longformer_core.tokenization.batch_encoding import BatchEncoding
    from longformer_core.tokenization.tokenizer import (
        LEDTokenizer,
        LEDTokenizerFast,
        LongformerTokenizer,
        LongformerTokenizerFast,
        load_tokenizer,
    )

__all__ = [
    "BatchEncoding",
    "CancelledError",
    "CheckpointError",
    "ConfigError",
    "Conversion",
    "DeadlineError",
    "Encoding",
    "EncodingEngine",
    "EncodingRequest",
    "Engine",
    "Estimate",
    "Generation",
    "GenerationConfig",
    "Handle",
    "LEDConfig",
    "LEDEncoderBaseModelOutput",
    "LEDForConditionalGeneration",
    "LEDForQuestionAnswering",
    "LEDForSequenceClassification",
    "LEDGenerateOutput",
    "LEDModel",
    "LEDPreTrainedModel",
    "LEDSeq2SeqLMOutput",
    "LEDSeq2SeqModelOutput",
    "LEDSeq2SeqQuestionAnsweringModelOutput",
    "LEDSeq2SeqSequenceClassifierOutput",
    "LEDTokenizer",
    "LEDTokenizerFast",
    "Layout",
    "Load",
    "LongformerBaseModelOutput",
    "LongformerBaseModelOutputWithPooling",
    "LongformerCausalConfig",
    "LongformerCausalLMOutput",
    "LongformerConfig",
    "LongformerError",
    "LongformerForCausalLM",
    "LongformerForMaskedLM",
    "LongformerForMultipleChoice",
    "LongformerForQuestionAnswering",
    "LongformerForSequenceClassification",
    "LongformerForTokenClassification",
    "LongformerMaskedLMOutput",
    "LongformerModel",
    "LongformerMultipleChoiceModelOutput",
    "LongformerPreTrainedModel",
    "LongformerQuestionAnsweringModelOutput",
    "LongformerSequenceClassifierOutput",
    "LongformerTokenClassifierOutput",
    "LongformerTokenizer",
    "LongformerTokenizerFast",
    "NonFiniteError",
    "OutOfMemoryError",
    "Request",
    "ShapeError",
    "TokenizerError",
    "Tokens",
    "TooLongError",
    "attention_dense",
    "check_directory",
    "convert_directory",
    "copy_global_projections",
    "default_global_positions",
    "dense_probabilities",
    "estimate_cost",
    "list_model_files",
    "load_tokenizer",
    "mark_choice",
    "mark_first_token",
    "mark_question",
    "mark_spans",
    "plan_conversion",
    "resolve",
    "window_attention",
    "window_attention_with_lse",
]

_HOME = {
    "BatchEncoding": "tokenization.batch_encoding",
    "CancelledError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "Conversion": "conversion.convert",
    "DeadlineError": "errors",
    "Encoding": "encoding.request",
    "EncodingEngine": "encoding.engine",
    "EncodingRequest": "encoding.request",
    "Engine": "generation.engine",
    "Estimate": "estimate",
    "Generation": "generation.request",
    "GenerationConfig": "generation.config",
    "Handle": "scheduling.handle",
    "LEDConfig": "config",
    "LEDEncoderBaseModelOutput": "models.outputs",
    "LEDForConditionalGeneration": "models.led",
    "LEDForQuestionAnswering": "models.led_heads",
    "LEDForSequenceClassification": "models.led_heads",
    "LEDGenerateOutput": "models.outputs",
    "LEDModel": "models.led",
    "LEDPreTrainedModel": "models.led",
    "LEDSeq2SeqLMOutput": "models.outputs",
    "LEDSeq2SeqModelOutput": "models.outputs",
    "LEDSeq2SeqQuestionAnsweringModelOutput": "models.outputs",
    "LEDSeq2SeqSequenceClassifierOutput": "models.outputs",
    "LEDTokenizer": "tokenization.tokenizer",
    "LEDTokenizerFast": "tokenization.tokenizer",
    "Layout": "layout",
    "Load": "scheduling.scheduler",
    "LongformerBaseModelOutput": "models.outputs",
    "LongformerBaseModelOutputWithPooling": "models.outputs",
    "LongformerCausalConfig": "config",
    "LongformerCausalLMOutput": "models.outputs",
    "LongformerConfig": "config",
    "LongformerError": "errors",
    "LongformerForCausalLM": "models.longformer_causal",
    "LongformerForMaskedLM": "models.longformer",
    "LongformerForMultipleChoice": "models.longformer",
    "LongformerForQuestionAnswering": "models.longformer",
    "LongformerForSequenceClassification": "models.longformer",
    "LongformerForTokenClassification": "models.longformer",
    "LongformerMaskedLMOutput": "models.outputs",
    "LongformerModel": "models.longformer",
    "LongformerMultipleChoiceModelOutput": "models.outputs",
    "LongformerPreTrainedModel": "models.longformer",
    "LongformerQuestionAnsweringModelOutput": "models.outputs",
    "LongformerSequenceClassifierOutput": "models.outputs",
    "LongformerTokenClassifierOutput": "models.outputs",
    "LongformerTokenizer": "tokenization.tokenizer",
    "LongformerTokenizerFast": "tokenization.tokenizer",
    "NonFiniteError": "errors",
    "OutOfMemoryError": "errors",
    "Request": "generation.request",
    "ShapeError": "errors",
    "TokenizerError": "errors",
    "Tokens": "scheduling.handle",
    "TooLongError": "errors",
    "attention_dense": "models.attention_maps",
    "check_directory": "checkpoints.directory",
    "convert_directory": "conversion.convert",
    "copy_global_projections": "conversion.convert",
    "default_global_positions": "layout",
    "dense_probabilities": "attention.dense",
    "estimate_cost": "estimate",
    "list_model_files": "checkpoints.directory",
    "load_tokenizer": "tokenization.tokenizer",
    "mark_choice": "models.global_attention_mask",
    "mark_first_token": "models.global_attention_mask",
    "mark_question": "models.global_attention_mask",
    "mark_spans": "models.global_attention_mask",
    "plan_conversion": "conversion.convert",
    "resolve": "hub",
    "window_attention": "attention.window",
    "window_attention_with_lse": "attention.window",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longformer_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"longformer_core.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
