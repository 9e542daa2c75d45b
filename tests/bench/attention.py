"""Window attention alone, at the geometry of the base models: 12 heads of 64, radius 256.

    python -m tests.bench.attention [--rounds 7] [--threads 2]

The opponent is scaled_dot_product_attention over blocks of 256 queries with overlapping key views
and a boolean mask. Outputs are compared first; then ratios of medians, all in one process:
forward against the opponent, 16,384 against 4,096 tokens, radius 64 against 256, and the memory of
65,536 tokens beside inputs and outputs. Without the compiled kernel, which training does not use:
forward against the opponent and against forward with it, forward and backward against forward.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longformer_core import Layout, window_attention
from longformer_core.attention.blocked import native
from tests.bench.measure import alternate, distance, emit, peak_bytes, settings

HEADS, HEAD_DIM, RADIUS, BLOCK = 12, 64, 256, 256
Inputs = tuple[Tensor, Tensor, Tensor]


def draw(num_tokens: int) -> Inputs:
    q, k, v = (torch.randn(num_tokens, HEADS, HEAD_DIM) for _ in range(3))
    return q, k, v


def ours(inputs: Inputs, radius: int = RADIUS) -> Callable[[], Tensor]:
    layout = Layout.from_lengths([len(inputs[0])], [[0]])

    @torch.no_grad()
    def run() -> Tensor:
        return window_attention(*inputs, layout, radius)

    return run


def in_plain_pytorch(run: Callable[[], object]) -> Callable[[], None]:
    """Run without the compiled kernel, also where there is one."""

    def run_plainly() -> None:
        with patch.object(native, "can_attend", return_value=False):
            run()

    return run_plainly


def blocks_of_sdpa(inputs: Inputs) -> Callable[[], Tensor]:
    """The first token is global: a column of its own where the window does not reach it."""
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in inputs)
    n = q.shape[2]
    plan = []
    for start in range(0, n, BLOCK):
        low, high = max(0, start - RADIUS), min(n, start + BLOCK + RADIUS)
        rows, columns = torch.arange(start, min(start + BLOCK, n)), torch.arange(low, high)
        mask = (rows[:, None] - columns).abs() <= RADIUS
        first = torch.ones(len(rows), 1, dtype=torch.bool)
        mask = torch.cat([first, mask if low else mask[:, 1:]], 1)
        plan.append((start, low, high, mask))

    @torch.no_grad()
    def run() -> Tensor:
        outputs = []
        for start, low, high, mask in plan:
            keys, values = k[:, :, low:high], v[:, :, low:high]
            if low:
                keys = torch.cat([k[:, :, :1], keys], 2)
                values = torch.cat([v[:, :, :1], values], 2)
            rows = q[:, :, start : start + BLOCK]
            outputs.append(scaled_dot_product_attention(rows, keys, values, attn_mask=mask))
        return torch.cat(outputs, 2)[0].transpose(0, 1)

    return run


def training(inputs: Inputs) -> Callable[[], None]:
    layout = Layout.from_lengths([len(inputs[0])], [[0]])
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    grad = torch.randn_like(inputs[0])

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        window_attention(leaves[0], leaves[1], leaves[2], layout, RADIUS).backward(grad)

    return run


def main() -> None:
    given = settings(__doc__, rounds=7)
    inputs, longer = draw(4096), draw(16384)
    error = distance(ours(inputs)(), blocks_of_sdpa(inputs)())
    assert error < 1e-5, f"the outputs differ by {error}: no speed is printed"
    median = alternate(
        {
            "sdpa": blocks_of_sdpa(inputs),
            "forward": ours(inputs),
            "plain_forward": in_plain_pytorch(ours(inputs)),
            "training": training(inputs),
            "radius_64": ours(inputs, 64),
            "longer": ours(longer),
        },
        given.rounds,
    )
    one, plain = median["forward"], median["plain_forward"]
    ratios = (
        ("sdpa_over_ours", median["sdpa"] / one, "at least", 1.0),
        ("sdpa_over_plain", median["sdpa"] / plain, "at least", 1.0),
        ("plain_over_ours", plain / one, "at least", 1.0),
        ("forward_and_backward_over_plain", median["training"] / plain, "at most", 3.5),
        ("16384_over_4096_tokens", median["longer"] / one, "at most", 4.4),
        ("radius_64_over_256", median["radius_64"] / one, "at most", 0.5),
    )
    for name, ratio, side, goal in ratios:
        emit("attention", name, ratio=ratio, goal=f"{side} {goal}", rounds=given.rounds)
    del longer
    huge = draw(65536)
    grown = peak_bytes(ours(huge))
    # The inputs are there before; what grows is the output and all that is needed on the way.
    total = grown + 3 * huge[0].nbytes
    limit = 1.3 * 4 * huge[0].nbytes + 200 * 2**20
    emit("attention", "bytes_of_65536_tokens", bytes=total, limit=int(limit))


if __name__ == "__main__":
    main()
