"""Compiled encoders: one graph without breaks, the same numbers, whatever documents it holds."""

from typing import Any

import pytest
import torch

from longformer_core import (
    Layout,
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerModel,
)
from tests.helpers import TINY
from tests.longformer_core.models.test_longformer import CONFIG

BUCKET = 96
LAYOUTS = (
    Layout.from_lengths([BUCKET], [[0]]),
    Layout.from_lengths([40, 50, 6], [[0], [0, 17], []]),
    Layout.from_lengths([90, 6], [[0], []], torch.arange(BUCKET) < 90),
    Layout.from_lengths([30, 66]),
)


def encoders() -> list[Any]:
    torch.manual_seed(0)
    longformer = LongformerModel(LongformerConfig(**CONFIG)).eval()
    led = LEDForConditionalGeneration(LEDConfig(vocab_size=50, **TINY)).eval()
    return [longformer.encoder, led.led.encoder]


# Torch's own, as inductor is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [0, 1], ids=["longformer", "led"])
def test_a_compiled_encoder(backend: str, family: int) -> None:
    torch.compiler.reset()
    encoder = encoders()[family]
    width = encoder.layernorm_embedding.weight.numel() if family else CONFIG["hidden_size"]
    graphs: list[Any] = []

    def count(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(encoder, fullgraph=True, backend=count)
    for layout in (*LAYOUTS, *LAYOUTS):
        states = torch.randn(BUCKET, width)
        given = (states, layout.positions, layout) if family else (states, layout)
        torch.testing.assert_close(compiled(*given), encoder(*given), rtol=1e-5, atol=1e-5)
    # Without a global token, with one, with several; not one for each batch.
    assert len(graphs) <= 4
