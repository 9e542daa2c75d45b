import pytest
import torch
from torch import Tensor

from longformer_core.ops.dropout import draw_kept, dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_what_is_kept_is_drawn_evenly(p: float) -> None:
    def draw_flags(seed: int, num: int = 4 * 50_000 + 3) -> Tensor:
        return draw_kept(torch.empty(num), p, torch.Generator().manual_seed(seed))

    flags = draw_flags(0)
    assert torch.equal(flags, draw_flags(0))
    assert torch.equal(draw_flags(1).unique(), flags.unique())
    assert flags.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-2)
    spread = (p / (1 - p)) ** 0.5
    # Each of the four numbers of a draw by itself, and each with its neighbours.
    for lane in range(4):
        assert float(flags[lane::4].mean()) == pytest.approx(1, abs=5 * spread / 50_000**0.5)
    centred = flags - flags.mean()
    for distance in (1, 2, 3, 4):
        together = float((centred[distance:] * centred[:-distance]).mean())
        assert abs(together) <= 5 * spread**2 / 200_000**0.5


def test_dropping_nothing_and_everything() -> None:
    draw = torch.Generator()
    assert draw_kept(torch.empty(9), 0.0, draw).tolist() == [1] * 9
    assert draw_kept(torch.empty(9), 1.0, draw).tolist() == [0] * 9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_states_are_dropped_in_training_only(dtype: torch.dtype) -> None:
    states = torch.linspace(1, 2, 20_000).to(dtype).view(4, -1).requires_grad_()
    assert dropout(states, 0.25, False) is states
    assert dropout(states, 0.0, True) is states
    torch.manual_seed(3)
    out = dropout(states, 0.25, True)
    assert out.dtype == dtype
    kept = out != 0
    assert float(kept.double().mean()) == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(out[kept], (states.double() / 0.75).to(dtype)[kept])
    out.sum().backward()
    assert states.grad is not None
    assert torch.equal(states.grad != 0, kept)
    torch.manual_seed(3)
    assert torch.equal(dropout(states, 0.25, True), out)
