"""Few rows against many keys on a GPU: the decoder's cross-attention, the encoder's global tokens.

    python -m tests.bench.fused_rows [one even mixed globals-1 globals-64] [--rounds 10]
        [--device cuda|cpu] [--dtype bfloat16] [--shrink 1]

The decoder's at the geometry of LED-large, 16 heads of 64: one document of 16,384 tokens, 16 such,
and 16 of 1,024 to 16,384, with 1, 4 and 16 rows each; through `CrossAttentionCache`, as the engine
does it, against `scaled_dot_product_attention` over the same padded groups and over each document
alone. On a GPU a turn is recorded and replayed, as the engine's steps are, over so many layers that
no cache holds their keys and values. `copy_share` is the part of the time in which a large copy
would have moved keys, values, rows and results once. The global tokens are those of 16 documents of
4,096 tokens, 12 heads, one and 64 each, projections included, forward and in training, against
plain PyTorch in the same form and in the cheaper one. Outputs are compared first. On the CPU, with
`--shrink`, it shows that the comparisons hold, and no GPU's speed.
"""

import argparse
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from longformer_core import Layout
from longformer_core.attention.cross_attention import CrossAttentionCache
from longformer_core.attention.global_attention import global_attention
from tests.bench.fused import CALLS, HEAD_DIM, TOLERANCE, repeated
from tests.bench.measure import alternate, cuda_bytes_per_s, distance, emit

# More than a cache holds: so much is read before anything is read again.
READ_BYTES = 2**29
NUM_ROWS = (1, 4, 16)
SOURCE_HEADS, GLOBAL_HEADS = 16, 12
SOURCES = {
    "one": (16384,),
    "even": (16384,) * 16,
    "mixed": tuple(1024 * n for n in range(1, 17)),
}
GLOBALS = {"globals-1": 1, "globals-64": 64}
GLOBAL_LENGTHS = (4096,) * 16
GOAL = {"copy_share": 0.85}

Call = Callable[[], Any]


def recorded(call: Call, device: str) -> Call:
    """Return a replay of a call on a GPU, and a wait for it; elsewhere the call."""
    if device == "cpu":
        return call
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run


def check(kind: str, outputs: Mapping[str, Tensor], limit: float) -> dict[str, float]:
    """Return how far other outputs are from ours."""
    errors = {
        name: distance(outputs["ours"], theirs)
        for name, theirs in outputs.items()
        if name != "ours"
    }
    for name, error in errors.items():
        assert error < limit, f"{kind}: {name} differs by {error}: no speed is printed"
    return errors


def report(kind: str, given: argparse.Namespace, times: Mapping[str, float], **more: Any) -> None:
    mine = times["ours"]
    emit(
        "fused-rows",
        kind,
        device=torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        dtype=given.dtype,
        rounds=given.rounds,
        ms={name: 1e3 * seconds for name, seconds in times.items()},
        ratios={name: seconds / mine for name, seconds in times.items() if name != "ours"},
        **more,
    )


def modules(count: int, d: int, given: argparse.Namespace) -> list[nn.Linear]:
    dtype = getattr(torch, given.dtype)
    return [nn.Linear(d, d, device=given.device, dtype=dtype) for _ in range(count)]


@torch.inference_mode()
def bench_source(name: str, given: argparse.Namespace, bytes_per_s: float) -> None:
    lengths = [max(1, length // given.shrink) for length in SOURCES[name]]
    dtype, d = getattr(torch, given.dtype), SOURCE_HEADS * HEAD_DIM
    key_bytes = 2 * sum(lengths) * d * dtype.itemsize
    num_layers = max(1, READ_BYTES // given.shrink // key_bytes)
    states = torch.randn(sum(lengths), d, device=given.device, dtype=dtype)
    layout = Layout.from_lengths(lengths, device=given.device)
    projections = modules(2 * num_layers, d, given)
    pairs = list(zip(projections[::2], projections[1::2], strict=True))
    hold = functools.partial(
        CrossAttentionCache, states, layout, pairs, SOURCE_HEADS, form="projected"
    )
    ours, plain = hold(), hold(implementation="blocked")
    alone = [
        [m(part).view(1, -1, SOURCE_HEADS, HEAD_DIM).transpose(1, 2).contiguous() for m in pair]
        for pair in pairs
        for part in states.split(lengths)
    ]
    for num_rows in NUM_ROWS:
        shape = (len(lengths) * num_rows, SOURCE_HEADS, HEAD_DIM)
        q = torch.randn(shape, device=given.device, dtype=dtype)
        turned = q.view(len(lengths), num_rows, SOURCE_HEADS, HEAD_DIM).transpose(1, 2)

        def each(layer: int, turned: Tensor = turned) -> Tensor:
            parts = alone[layer * len(lengths) : (layer + 1) * len(lengths)]
            outputs = [
                scaled_dot_product_attention(rows[None], *part)
                for rows, part in zip(turned, parts, strict=True)
            ]
            return torch.cat(outputs).transpose(1, 2).reshape(-1, d)

        attends: dict[str, Callable[[int], Tensor]] = {
            "ours": functools.partial(ours.attend, q=q, rows_per_document=num_rows),
            "sdpa": functools.partial(plain.attend, q=q, rows_per_document=num_rows),
            "sdpa_each": each,
        }
        kind = f"source-{name}-{num_rows}"
        outputs = {other: attend(num_layers - 1) for other, attend in attends.items()}
        errors = check(kind, outputs, TOLERANCE[given.dtype])
        calls = {
            other: recorded(functools.partial(all_layers, attend, num_layers), given.device)
            for other, attend in attends.items()
        }
        found = alternate(calls, given.rounds)
        times = {other: seconds / num_layers for other, seconds in found.items()}
        num_bytes = key_bytes + 2 * q.nbytes
        share = num_bytes / bytes_per_s / times["ours"]
        is_gpu = given.device == "cuda"
        report(
            kind,
            given,
            times,
            errors=errors,
            num_layers=num_layers,
            num_bytes=num_bytes,
            **({"copy_share": share, "copy_share_goal": GOAL["copy_share"]} if is_gpu else {}),
        )


def all_layers(attend: Callable[[int], Tensor], num_layers: int) -> None:
    for layer in range(num_layers):
        attend(layer)


def bench_globals(name: str, given: argparse.Namespace) -> None:
    lengths = [max(1, length // given.shrink) for length in GLOBAL_LENGTHS]
    d = GLOBAL_HEADS * HEAD_DIM
    positions = [range(min(GLOBALS[name], n)) for n in lengths]
    layout = Layout.from_lengths(lengths, positions, device=given.device)
    states = torch.randn(sum(lengths), d, device=given.device, dtype=getattr(torch, given.dtype))
    states.requires_grad_()
    projections = modules(3, d, given)
    attend = functools.partial(
        global_attention, states, layout, *projections, GLOBAL_HEADS, form="projected"
    )
    contestants: dict[str, Callable[[], Tensor]] = {
        "ours": attend,
        "plain": functools.partial(attend, implementation="blocked"),
        "cheaper": functools.partial(attend, form="auto", implementation="blocked"),
    }
    leaves = [states, *(m.weight for m in projections)]

    def trained(call: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        out = call()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    def forward(call: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return call()

    outputs = {other: forward(call) for other, call in contestants.items()}
    errors = check(name, outputs, TOLERANCE[given.dtype])
    for passes, run in (("forward", forward), ("training", trained)):
        count = CALLS if given.device == "cuda" else 1
        calls = {
            other: repeated(functools.partial(run, call), given.device)
            for other, call in contestants.items()
        }
        times = {o: t / count for o, t in alternate(calls, given.rounds).items()}
        report(f"{name}-{passes}", given, times, errors=errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*SOURCES, *GLOBALS]
    parser.add_argument("cases", nargs="*", choices=[[], *names], default=[])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    parser.add_argument("--shrink", type=int, default=1)
    given = parser.parse_args()
    torch.manual_seed(0)
    bytes_per_s = cuda_bytes_per_s() if given.device == "cuda" else math.inf
    for name in given.cases or names:
        if name in SOURCES:
            bench_source(name, given, bytes_per_s)
        else:
            bench_globals(name, given)


if __name__ == "__main__":
    main()
