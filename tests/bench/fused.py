"""Window attention on a GPU against whatever else computes the same, forward and backward.

    python -m tests.bench.fused [base globals large mixed causal] [--rounds 10] [--device cuda|cpu]
        [--dtype bfloat16] [--shrink 1]

Heads of 64: 16 documents of 4,096 tokens, 12 heads, radius 256 with one and with 64 global tokens
each; 4 documents of 16,384, 16 heads, radius 512; documents of 512 to 16,384 tokens; and causal.
The opponents are transformers' self-attention module with its projections taken out (it computes
the rows of global queries too, which is not taken off), compiled FlexAttention with the same mask,
torch's flash attention over a window merged with the global columns by log-sum-exp, and
`scaled_dot_product_attention` with a dense mask; each where it can compute the case. Inputs lie as
each of them wants them. Outputs are compared first, rows of global tokens left out; then all take
turns. `floor_share` is the part of the time in which the GPU could have done the useful flops, at
the rate of a large product, or moved inputs and results once, at that of a large copy, whichever
takes longer. `one_program_each_over_persistent` is how much longer the forward kernel takes with a
program for each tile and head, where ours has as many as the GPU holds and they walk. On the CPU,
with `--shrink`, it shows that the comparisons hold, and no GPU's speed.
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from longformer_core import Layout, window_attention
from longformer_core.attention.fused import window as kernels
from tests.bench.measure import (
    alternate,
    cuda_bytes_per_s,
    cuda_flops_per_s,
    cuda_peak_bytes,
    distance,
    emit,
    print_table,
)

HEAD_DIM = 64
# Calls of one turn: the host waits for the GPU once for all of them.
CALLS = 10
# A mask of all pairs for longer documents does not fit beside the rest.
MOST_DENSE = 4096
# More programs than any call has pairs of tile and head.
MANY = 2**24
STANDING = "one_program_each"
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}
# Ratios to opponents and shares of the floor, forward and backward.
GOALS = {
    "base": {"forward": 0.40, "backward": 0.30},
    "globals": {"forward": 0.40, "backward": 0.30},
    "large": {"forward": 0.45, "backward": 0.30},
}
FASTER = {"transformers": {"forward": 12.0, "backward": 10.0}, "flex": {"forward": 1.2}}


@dataclass(frozen=True)
class Case:
    """Documents, and what their tokens see."""

    lengths: tuple[int, ...]
    num_heads: int
    radius: int
    num_globals: int = 1
    is_causal: bool = False

    def shrunk(self, by: int) -> "Case":
        lengths = tuple(max(1, length // by) for length in self.lengths)
        radius, num_globals = (max(1, x // by) for x in (self.radius, self.num_globals))
        return replace(self, lengths=lengths, radius=radius, num_globals=num_globals)

    @property
    def is_even(self) -> bool:
        return len(set(self.lengths)) == 1

    def layout(self, device: str) -> Layout:
        positions = [list(range(self.num_globals))] * len(self.lengths)
        return Layout.from_lengths(self.lengths, positions, device=device)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Return which positions i of one document see which j."""
        near = ((i - j).abs() <= self.radius) | (j < self.num_globals)
        return near & (j <= i) if self.is_causal else near

    @property
    def num_pairs(self) -> int:
        """Return how many scores are needed for one head."""
        total = 0
        for n in self.lengths:
            reach = min(self.radius, n - 1)
            behind = n * reach - reach * (reach + 1) // 2
            # Globals stand first: those further behind than the window.
            far = sum(max(0, n - 1 - self.radius - g) for g in range(self.num_globals))
            ahead = 0 if self.is_causal else behind
            total += n + behind + ahead + far
        return total


CASES = {
    "base": Case((4096,) * 16, 12, 256),
    "globals": Case((4096,) * 16, 12, 256, num_globals=64),
    "large": Case((16384,) * 4, 16, 512),
    "mixed": Case(
        (16384, 12288, 8192, 8192, 6144, 4096, 4096, 2048, 2048, 1024, 512, 512), 12, 256
    ),
    "causal": Case((4096,) * 16, 12, 512, is_causal=True),
}


@dataclass(frozen=True)
class Contestant:
    """An attention with its inputs as it wants them, and how its output is packed [T, H, D]."""

    inputs: tuple[Tensor, Tensor, Tensor]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    packed: Callable[[Tensor], Tensor]
    can_train: bool = True

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.attend(*(x.detach() for x in self.inputs))

    def gradients(self) -> tuple[Tensor, ...]:
        out = self.attend(*self.inputs)
        return torch.autograd.grad(out, self.inputs, torch.ones_like(out))

    def backward(self) -> Callable[[], Any]:
        """Return a call of the backward pass alone."""
        out = self.attend(*self.inputs)
        grad = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, self.inputs, grad, retain_graph=True)


Inputs = tuple[Tensor, Tensor, Tensor]


def draw(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    shape = (sum(case.lengths), case.num_heads, HEAD_DIM)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    return q, k, v


def leaves(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    q, k, v = (change(x).detach().clone().requires_grad_() for x in inputs)
    return q, k, v


def ours(case: Case, inputs: Inputs) -> Contestant:
    layout = case.layout(inputs[0].device.type)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, layout, case.radius, causal=case.is_causal)

    return Contestant(leaves(inputs, lambda x: x), attend, lambda out: out)


class Given(nn.Module):
    """Stands where a projection was, and gives what is projected already."""

    def forward(self, _: Tensor) -> Tensor:
        return self.value


def published(case: Case, inputs: Inputs) -> Contestant | None:
    if not case.is_even or case.is_causal:
        return None
    batch, n, h = len(case.lengths), case.lengths[0], case.num_heads
    config = transformers.LongformerConfig(
        attention_window=[2 * case.radius],
        num_attention_heads=h,
        hidden_size=h * HEAD_DIM,
        attention_probs_dropout_prob=0.0,
    )
    module = LongformerSelfAttention(config, 0)
    names = ("query", "key", "value")
    for name in (*names, "key_global", "value_global"):
        setattr(module, name, Given())
    module.query_global = nn.Identity()
    is_global = torch.arange(n, device=inputs[0].device).expand(batch, n) < case.num_globals
    mask = 10000.0 * is_global
    states = inputs[0].new_zeros(batch, n, h * HEAD_DIM)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # It divides the queries that it is given in place.
        module.query.value = q.clone()
        module.key.value = module.key_global.value = k
        module.value.value = module.value_global.value = v
        out: Tensor = module(
            states,
            attention_mask=mask,
            is_index_masked=torch.zeros_like(is_global),
            is_index_global_attn=is_global,
            is_global_attn=case.num_globals > 0,
        )[0]
        return out

    def turned(x: Tensor) -> Tensor:
        return x.view(batch, n, h * HEAD_DIM).transpose(0, 1)

    return Contestant(leaves(inputs, turned), attend, lambda out: out.reshape(-1, h, HEAD_DIM))


def flex(case: Case, inputs: Inputs) -> Contestant:
    layout = case.layout(inputs[0].device.type)
    positions = layout.positions
    document = torch.repeat_interleave(
        torch.arange(len(case.lengths)), torch.tensor(case.lengths)
    ).to(positions.device)

    def mask(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & case.sees(positions[i], positions[j])

    is_gpu = positions.is_cuda
    num_tokens = len(positions)
    block_mask = create_block_mask(
        mask, None, None, num_tokens, num_tokens, device=positions.device, _compile=is_gpu
    )
    run = torch.compile(flex_attention, dynamic=False) if is_gpu else flex_attention
    attend = functools.partial(run, block_mask=block_mask)
    return Contestant(
        leaves(inputs, lambda x: x.transpose(0, 1)[None]),
        attend,
        lambda out: out[0].transpose(0, 1),
        can_train=is_gpu,
    )


def merged(case: Case, inputs: Inputs) -> Contestant | None:
    """Flash attention over the window, and a small one over the columns of globals outside it."""
    if inputs[0].device.type != "cuda" or inputs[0].dtype == torch.float32:
        return None
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    layout = case.layout("cuda")
    window = (case.radius, 0 if case.is_causal else case.radius)
    # Documents of one length are a batch; else every token has its document's globals at hand.
    batch = len(case.lengths) if case.is_even else layout.num_tokens
    starts = torch.arange(layout.num_tokens, device="cuda") - layout.positions
    slots = starts.view(batch, -1)[:, :1] + torch.arange(case.num_globals, device="cuda")
    columns = torch.arange(case.num_globals, device="cuda")
    distance_to = layout.positions.view(batch, -1, 1) - columns
    extra = distance_to > case.radius
    if not case.is_causal:
        extra = distance_to.abs() > case.radius

    def columns_of(q: Tensor, k: Tensor, v: Tensor, local: Tensor, lse: Tensor) -> Tensor:
        rows = q.view(batch, -1, *q.shape[1:])
        scores = torch.einsum("bnhd,bghd->bnhg", rows, k[slots]).float() * HEAD_DIM**-0.5
        scores = scores.masked_fill(~extra[:, :, None], -math.inf)
        both = torch.logaddexp(scores.logsumexp(-1), lse.view(batch, -1, lse.shape[1]))
        weights = (scores - both[..., None]).exp().to(v.dtype)
        share = (lse.view_as(both) - both).exp()[..., None].to(v.dtype)
        far = torch.einsum("bnhg,bghd->bnhd", weights, v[slots])
        return (local.view_as(rows) * share + far).view_as(q)

    compiled = torch.compile(columns_of, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        longest = max(case.lengths)
        local, lse = varlen_attn(
            q, k, v, layout.offsets, layout.offsets, longest, longest,
            window_size=window, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        # The order of its dimensions is not the same in all versions.
        lse = lse if len(lse) == len(q) else lse.t()
        return compiled(q, k, v, local, lse)

    return Contestant(leaves(inputs, lambda x: x), attend, lambda out: out)


def dense(case: Case, inputs: Inputs) -> Contestant | None:
    n = case.lengths[0]
    if not case.is_even or n > MOST_DENSE:
        return None
    places = torch.arange(n, device=inputs[0].device)
    mask = case.sees(places[:, None], places)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return Contestant(
        leaves(inputs, lambda x: x.unflatten(0, (-1, n)).transpose(1, 2)),
        attend,
        lambda out: out.transpose(1, 2).flatten(0, 1),
    )


OPPONENTS = {"transformers": published, "flex": flex, "merged": merged, "dense": dense}


def check(name: str, case: Case, mine: Contestant, theirs: Contestant, limit: float) -> float:
    """Return how far two outputs are apart; rows of globals are not the operation's."""
    is_global = torch.cat([torch.arange(n) < case.num_globals for n in case.lengths])
    one, other = (c.packed(c.forward())[~is_global] for c in (mine, theirs))
    error = distance(one, other)
    assert error < limit, f"{name} differs by {error}: no speed is printed"
    return error


def repeated(call: Callable[[], Any], device: str) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS if device == "cuda" else 1):
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


@contextmanager
def one_program_each() -> Iterator[None]:
    """Let no program of the forward kernel take more than one tile and head."""
    walking = dict(kernels._TILES)
    kernels._TILES.update({name: tiles._replace(resident=MANY) for name, tiles in walking.items()})
    try:
        yield
    finally:
        kernels._TILES.update(walking)


def standing(mine: Contestant) -> Callable[[], Tensor]:
    """Return our forward pass with one program each, whose output is found to be the same."""

    def forward() -> Tensor:
        with one_program_each():
            return mine.forward()

    assert torch.equal(forward(), mine.forward()), "how programs walk changes the output"
    return forward


def floor_s(case: Case, passes: str, itemsize: int, rates: tuple[float, float]) -> float:
    """Return the least seconds of a pass: two products forward, five backward."""
    tensor_bytes = sum(case.lengths) * case.num_heads * HEAD_DIM * itemsize
    products, tensors = (2, 4) if passes == "forward" else (5, 8)
    flops = 2 * products * case.num_pairs * case.num_heads * HEAD_DIM
    return max(flops / rates[0], tensors * tensor_bytes / rates[1])


def bench(
    name: str, case: Case, given: argparse.Namespace, rates: tuple[float, float]
) -> list[dict[str, Any]]:
    """Measure one case; return the lines of its table."""
    dtype = getattr(torch, given.dtype)
    inputs = draw(case, given.device, dtype)
    contestants = {"ours": ours(case, inputs)}
    errors = {}
    for other, make in OPPONENTS.items():
        made = make(case, inputs)
        if made is not None:
            limit = TOLERANCE[given.dtype]
            errors[other] = check(f"{name}: {other}", case, contestants["ours"], made, limit)
            contestants[other] = made
    lines = []
    for passes in ("forward", "backward"):
        calls = {
            other: repeated(c.forward if passes == "forward" else c.backward(), given.device)
            for other, c in contestants.items()
            if passes == "forward" or c.can_train
        }
        if passes == "forward":
            calls[STANDING] = repeated(standing(contestants["ours"]), given.device)
        count = CALLS if given.device == "cuda" else 1
        times = {o: t / count for o, t in alternate(calls, given.rounds).items()}
        lines.append(report(name, case, given, passes, times, errors, rates))
    if given.device == "cuda":
        memory = {other: cuda_peak_bytes(c.gradients) for other, c in contestants.items()}
        emit("fused", f"{name}-memory", peak_bytes=memory)
    return lines


def report(
    name: str,
    case: Case,
    given: argparse.Namespace,
    passes: str,
    times: dict[str, float],
    errors: dict[str, float],
    rates: tuple[float, float],
) -> dict[str, Any]:
    mine = times["ours"]
    standing_s = times.pop(STANDING, None)
    flops = 2 * (2 if passes == "forward" else 5) * case.num_pairs * case.num_heads * HEAD_DIM
    is_gpu = given.device == "cuda"
    share = floor_s(case, passes, getattr(torch, given.dtype).itemsize, rates) / mine
    found = emit(
        "fused",
        f"{name}-{passes}",
        device=torch.cuda.get_device_name() if is_gpu else "cpu",
        dtype=given.dtype,
        rounds=given.rounds,
        ms={other: 1e3 * seconds for other, seconds in times.items()},
        ratios={other: seconds / mine for other, seconds in times.items() if other != "ours"},
        ratio_goals={o: goals[passes] for o, goals in FASTER.items() if passes in goals},
        **({f"{STANDING}_over_persistent": standing_s / mine} if standing_s else {}),
        useful_tflops=flops / mine / 1e12,
        **({"floor_share": share} if is_gpu else {}),
        floor_share_goal=GOALS.get(name, {}).get(passes),
        errors=errors,
    )
    ratios = {f"{other} / ours": ratio for other, ratio in found["ratios"].items()}
    standing_ratio = found.get(f"{STANDING}_over_persistent", "")
    figures = {
        "one program each / ours": standing_ratio,
        "TFLOP/s": found["useful_tflops"],
        "share of floor": found.get("floor_share", ""),
    }
    return {"case": found["kind"], "ms": found["ms"]["ours"], **ratios, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    parser.add_argument("--shrink", type=int, default=1)
    given = parser.parse_args()
    rates = (math.inf, math.inf)
    if given.device == "cuda":
        rates = cuda_flops_per_s(getattr(torch, given.dtype)), cuda_bytes_per_s()
    lines: list[dict[str, Any]] = []
    for name in given.cases or CASES:
        lines += bench(name, CASES[name].shrunk(given.shrink), given, rates)
    print_table(lines)


if __name__ == "__main__":
    main()
