"""The kernels compiled for CPUs against torch's, at the sizes of the base models.

    python -m tests.bench.cpu_kernels [--rounds 9] [--threads 2]

Few rows with the weights of a layer and of the output projection, and attention of few rows to the
keys and values of a source (12 heads of 64); each call goes through as many weights, or layers, as
do not fit into the caches. Many rows with the weights of a layer, against torch's product, for
bfloat16 in float32, widened and rounded around it, if that is the faster way here. Window attention
is in `tests.bench.attention`.
Outputs are compared with float64 first: where ours are further off than torch's, no speed is
printed. `ratio` is torch's time over ours, `gb_per_s` what ours reads of weights or keys.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from longformer_core.ops.cpu import decode, gemm
from longformer_core.ops.linear import Linear
from tests.bench.measure import alternate, distance, emit, settings

HEADS, HEAD_DIM = 12, 64
WEIGHTS = ((768, 768), (3072, 768), (768, 3072), (50265, 768))
ROWS = {torch.float32: (1, 4, 8, 16, 24), torch.bfloat16: (1, 4, 8, 16, 32, 64)}
SOURCES = (2048, 16384)
MANY_ROWS = (96, 256, 1024, 8192)
# More than the second level of caches; the third belongs to a whole server.
BYTES = 200_000_000

Call = Callable[[], Tensor]


def compare(
    kind: str, name: str, pairs: list[tuple[Call, Call, Call]], num_bytes: int, rounds: int
) -> None:
    """Measure calls of (ours, torch's, torch's in float64), which read so many bytes each."""
    mine, theirs, exact = (call() for call in pairs[0])
    errors = distance(mine, exact), distance(theirs, exact)
    assert errors[0] <= 1.5 * errors[1] + 1e-7, f"{name}: errors {errors}: no speed is printed"
    seconds = alternate(
        {
            "ours": lambda: [ours() for ours, _, _ in pairs],
            "torch": lambda: [torchs() for _, torchs, _ in pairs],
        },
        rounds,
    )
    emit(
        kind,
        name,
        ratio=seconds["torch"] / seconds["ours"],
        gb_per_s=num_bytes * len(pairs) / seconds["ours"] / 1e9,
        ms=1e3 * seconds["ours"] / len(pairs),
        torch_ms=1e3 * seconds["torch"] / len(pairs),
        error=errors[0],
        torch_error=errors[1],
        rounds=rounds,
    )


def bench_products(shape: tuple[int, int], num_rows: int, dtype: torch.dtype, rounds: int) -> None:
    x = torch.randn(num_rows, shape[1]).to(dtype)
    num_bytes = shape[0] * shape[1] * x.element_size()
    weights = [torch.randn(shape).to(dtype) for _ in range(max(2, BYTES // num_bytes))]
    compare(
        "few rows",
        f"{shape[0]} x {shape[1]}, {num_rows} rows, {dtype}".replace("torch.", ""),
        [
            (
                lambda w=w: decode.multiply(x, w, None),
                lambda w=w: linear(x, w),
                lambda w=w: linear(x.double(), w.double()),
            )
            for w in weights
        ],
        num_bytes,
        rounds,
    )


def bench_attention(num_tokens: int, num_rows: int, dtype: torch.dtype, rounds: int) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, HEAD_DIM).to(dtype)

    def by_torch(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)

    q = draw(num_rows, HEADS)
    num_bytes = 2 * HEADS * num_tokens * HEAD_DIM * q.element_size()
    layers = [
        (draw(HEADS, num_tokens), draw(HEADS, num_tokens))
        for _ in range(max(2, BYTES // num_bytes))
    ]
    compare(
        "few rows",
        f"{num_tokens} tokens, {num_rows} rows, {dtype}".replace("torch.", ""),
        [
            (
                lambda k=k, v=v: decode.attend(q, k, v, [num_tokens]),
                lambda k=k, v=v: by_torch(q, k, v),
                lambda k=k, v=v: by_torch(q.double(), k.double(), v.double()),
            )
            for k, v in layers
        ],
        num_bytes,
        rounds,
    )


def bench_gemm(shape: tuple[int, int], num_rows: int, dtype: torch.dtype, rounds: int) -> None:
    x, w, bias = (torch.randn(s).to(dtype) for s in ((num_rows, shape[1]), shape, shape[:1]))
    module = Linear(*shape[::-1]).to(dtype)
    module.weight, module.bias = torch.nn.Parameter(w), torch.nn.Parameter(bias)

    def by_torch() -> Tensor:
        with patch.object(gemm, "can_multiply", return_value=False):
            return module(x)

    compare(
        "many rows",
        f"{shape[0]} x {shape[1]}, {num_rows} rows, {dtype}".replace("torch.", ""),
        [
            (
                lambda: gemm.multiply(x, w, bias),
                by_torch,
                lambda: linear(x.double(), w.double(), bias.double()),
            )
        ],
        w.nbytes,
        rounds,
    )


def main() -> None:
    given = settings(__doc__, rounds=9)
    with torch.inference_mode():
        for dtype, rows in ROWS.items():
            for num_rows in MANY_ROWS:
                for shape in WEIGHTS[:-1]:
                    bench_gemm(shape, num_rows, dtype, given.rounds)
            for num_rows in rows:
                for shape in WEIGHTS:
                    bench_products(shape, num_rows, dtype, given.rounds)
                for num_tokens in SOURCES if num_rows <= 16 else ():
                    bench_attention(num_tokens, num_rows, dtype, given.rounds)


if __name__ == "__main__":
    main()
