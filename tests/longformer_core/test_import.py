"""The core works without Ray, Arrow, click and transformers, and never imports torch's compiler."""

import subprocess
import sys
from pathlib import Path

import longformer_core

HIDDEN = ("ray", "pyarrow", "click", "transformers")
SCRIPT = f"""
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (hidden)")

sys.meta_path.insert(0, Hide())
import torch
import longformer_core as core

assert not any(name in sys.modules for name in {HIDDEN})
model = core.LEDForConditionalGeneration.from_pretrained(sys.argv[1])
tokenizer = core.LEDTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer.encode("A short text, encoded where little else is installed.")
layout = core.Layout.from_lengths([len(ids)])
with torch.inference_mode():
    states = model.encode(torch.tensor(ids), layout)
assert states.shape == (len(ids), model.config.d_model)
assert states.isfinite().all()
options = core.GenerationConfig(max_new_tokens=4, min_new_tokens=4, num_beams=2)
generation = core.Engine(model).add(ids, options).result(60)
assert generation.error is None
assert not any(name in sys.modules for name in {HIDDEN})
# Importing it takes a second or more of every process with a model, and of its first document.
assert "torch._dynamo" not in sys.modules
print("encoded", len(ids))
"""


def test_core_runs_alone(led_directory: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(led_directory)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(longformer_core.__file__).parents[1],
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("encoded ")


def test_public_names() -> None:
    assert longformer_core.__all__ == sorted(longformer_core.__all__)
    for name in longformer_core.__all__:
        assert getattr(longformer_core, name).__module__.startswith("longformer_core.")
    assert longformer_core.__all__ == [
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
