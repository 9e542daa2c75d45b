"""Row-wise work by chunks: the same numbers, whatever the model, in less memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longformer_core import LEDConfig, LEDModel, LongformerConfig, LongformerModel
from longformer_core.ops import chunking
from longformer_core.ops.chunking import in_chunks, most_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_rows", [0, 1, 6, 7, 8, 14, 20])
def test_every_row_is_computed_once(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunking._ROWS, "cpu", 7)
    sizes = []

    def double(rows: Tensor, others: Tensor) -> Tensor:
        sizes.append(len(rows))
        return (2 * rows + others).double()

    rows, others = torch.randn(2, num_rows, 3)
    with torch.no_grad():
        out = in_chunks(double, rows, others)
    assert torch.equal(out, (2 * rows + others).double())
    assert sum(sizes) == num_rows
    assert max(sizes) <= most_rows(CPU) == 7


def test_a_gradient_needs_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunking._ROWS, "cpu", 2)
    rows = torch.randn(5, 3, requires_grad=True)
    in_chunks(torch.square, rows).sum().backward()
    assert torch.equal(rows.grad, 2 * rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("family", ["longformer", "led"])
def test_models_give_the_same(family: str, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any
    if family == "led":
        model = LEDModel(LEDConfig(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=1))
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LongformerModel(LongformerConfig(vocab_size=99, **sizes, attention_window=8))
    model = model.to(torch.float16 if half else torch.float32).eval()
    encode = model.encode_padded if family == "led" else model
    ids = torch.randint(5, 99, (2, 50))
    with torch.no_grad():
        whole = encode(input_ids=ids).last_hidden_state
        monkeypatch.setitem(chunking._ROWS, "cpu", 7)
        parts = encode(input_ids=ids).last_hidden_state
    assert parts.dtype == whole.dtype
    torch.testing.assert_close(parts, whole, rtol=0, atol=4e-3 if half else 1e-5)
