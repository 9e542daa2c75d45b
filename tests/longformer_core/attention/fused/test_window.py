"""The Triton kernels against the dense definition in float64.

On a CUDA device they run as they are. Elsewhere Triton's interpreter runs them, which it does only
where TRITON_INTERPRET was set before anything imported Triton: if it was not, these tests run in a
process of their own, which a test here starts. Tiles are made small, so that short documents have
several.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from longformer_core.attention import window_attention
from longformer_core.attention.band import Band
from longformer_core.attention.fused import plan
from longformer_core.attention.reference import _dropped, visible_keys
from longformer_core.attention.window import window_attention_with_lse
from longformer_core.layout import Layout
from tests.longformer_core.attention.fused.interpreter import interpret

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
CAN_RUN = IS_INTERPRETED or DEVICE == "cuda"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTH, RADIUS, TILE = 40, 4, 16
# Where the global tokens of a 40-token document lie; a window from token 20 spans 16 to 24.
GLOBALS: dict[str, list[int]] = {
    "first": [0],
    "inside": [18],
    "edge": [16, 24],
    "one past": [15, 25],
    "adjacent": [19, 20, 21],
    "last": [39],
    "all": list(range(LENGTH)),
}


@contextmanager
def small_tiles(num_programs: int = 2) -> Iterator[None]:
    """Cut everything so small that few tokens are several of it; few programs have to walk."""
    from longformer_core.attention.fused import common
    from longformer_core.attention.fused import window as fused

    small = common.Tiles(TILE, TILE, 4, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_TILES", dict.fromkeys(fused._TILES, small))
        patch.setattr(fused, "_GROUP", 2)
        patch.setattr(fused, "_num_multiprocessors", lambda _: num_programs)
        patch.setattr(plan, "_PART", TILE)
        patch.setattr(common, "_READ", TILE)
        patch.setattr(fused, "_SUM_BLOCK", TILE)
        yield


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let memory that nobody has written hold NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        assert torch.ones(1).new_empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def right_bfloat16() -> Iterator[None]:
    """Let Triton's interpreter compute with bfloat16.

    Of version 3.9, it multiplies the bits as integers, and rounds towards zero where a GPU rounds
    to the nearest.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    cast, dot = Builder.cast_impl, Builder.create_dot

    def widened(x: Any) -> Any:
        is_bfloat16 = x.dtype.scalar == tl.bfloat16
        return type(x)(_from_bits(x.data), tl.float32) if is_bfloat16 else x

    def right_cast(self: Any, x: Any, dtype: Any) -> Any:
        if dtype.scalar == tl.bfloat16 and x.dtype.scalar == tl.float32:
            return type(x)(_to_bits(x.data), tl.bfloat16)
        return cast(self, widened(x), dtype)

    def right_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "cast_impl", right_cast)
        patch.setattr(Builder, "create_dot", right_dot)
        yield


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bits(numbers: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.array(numbers)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


@pytest.fixture(autouse=True)
def bfloat16() -> Iterator[None]:
    with right_bfloat16() if IS_INTERPRETED else nullcontext():
        yield


def draw(
    num_tokens: int, dtype: torch.dtype, *, num_heads: int = 1, head_dim: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, num_tokens, num_heads, head_dim)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(
    inputs: Sequence[Tensor], layout: Layout, radius: int, implementation: Any, **options: Any
) -> list[Tensor]:
    """The output, the log-sum-exp, and the gradients of a sum of the output, unequal weights."""
    attend = partial(window_attention_with_lse, implementation=implementation)
    return with_gradients(attend, inputs, layout, radius, **options)


def run_eager(
    inputs: Sequence[Tensor], layout: Layout, radius: int, **options: Any
) -> list[Tensor]:
    """What `run` returns, of attention as eager code has it: products in the dtype of the inputs.

    The definition computes in 32 bits and rounds results alone, which no kernel for 16 bits does:
    `fused` rounds the probabilities before they are multiplied by values or by gradients of the
    output, and the gradients of the scores before they are multiplied by keys or queries. With
    these alone its gradients have up to four times the definition's error on short documents.

    The first of them reaches dq twice: the output, and with it the sum that is taken off each row
    of the scores' gradients, holds rounded probabilities, and those gradients hold exact ones. With
    few keys that alone can be 2.6 times the error of eager code, so few keys go back in 32 bits.
    """
    return with_gradients(eager_attention, inputs, layout, radius, **options)


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    radius: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    dilation: int | Sequence[int] = 1,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    band = Band.of(radius, q.shape[1], dilation, causal=causal)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    seed = int(torch.randint(2**63 - 1, ())) if dropout_p else 0
    outputs, sums = [q[:0]], [q.new_zeros(0, q.shape[1], dtype=torch.float32)]
    for (start, end), positions in zip(
        pairwise(layout.cu_seqlens), layout.global_positions, strict=True
    ):
        is_valid = None if layout.is_valid is None else layout.is_valid[start:end]
        sees = visible_keys(end - start, band, positions, is_valid).to(q.device)
        queries, keys, values = (x[start:end].transpose(0, 1) for x in (q, k, v))
        scores = (queries @ keys.transpose(1, 2)).float() * scale
        scores = scores.masked_fill(~sees, -torch.inf)
        sums.append(scores.detach().logsumexp(-1).t())
        scores = scores.masked_fill(~sees.any(-1, keepdim=True), 0.0)
        weights = _dropped(scores.softmax(-1).masked_fill(~sees, 0.0), (dropout_p, seed), start)
        outputs.append((weights.to(values) @ values).transpose(0, 1))
    return torch.cat(outputs), torch.cat(sums)


def with_gradients(
    attend: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    layout: Layout,
    radius: int,
    **options: Any,
) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    torch.manual_seed(7)
    out, lse = attend(q, k, v, layout, radius, **options)
    # The same numbers in every dtype, or the oracle's gradients are of another function.
    weights = torch.linspace(-1, 1, out.numel()).bfloat16().view_as(out)
    grads = torch.autograd.grad(out, (q, k, v), weights.to(out))
    assert not lse.requires_grad
    return [out.detach(), lse, *grads]


def check(
    layout: Layout,
    radius: int = RADIUS,
    dtype: torch.dtype = torch.float32,
    inputs: tuple[Tensor, ...] | None = None,
    num_heads: int = 1,
    **options: Any,
) -> list[Tensor]:
    """Return what the kernels give, after it was found as good as `compare` asks for."""
    inputs = inputs or draw(layout.num_tokens, dtype, num_heads=num_heads)
    oracle = run([x.double() for x in inputs], layout, radius, "reference", **options)
    eager = run_eager(inputs, layout, radius, **options)
    with small_tiles(), poisoned_memory():
        mine = run(inputs, layout, radius, "fused", **options)
    compare(mine, eager, oracle)
    return mine


def compare(mine: list[Tensor], eager: list[Tensor], oracle: list[Tensor]) -> None:
    """Hold the rule, for each result: error at most twice that of the plain way in the same dtype.

    Where no query sees two keys, the gradients of queries and keys are exactly zero: they have no
    size to measure by, and the plain way finds the zeros by luck. They are then measured with the
    gradient of the values.
    """
    for theirs, plain, ours in zip(oracle, eager, mine, strict=True):
        assert ours.dtype == plain.dtype
        assert ours.shape == plain.shape
        assert torch.equal(ours == -torch.inf, theirs == -torch.inf)
    for index, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        with_values = name in ("dq", "dk") and not oracle[index].any()
        some = [index, 4] if with_values else [index]
        theirs, plain, ours = (_flat([x[i] for i in some]) for x in (oracle, eager, mine))
        if len(theirs):
            limit = 2 * (plain - theirs).abs().max() + 1e-6 * theirs.abs().max()
            assert (ours - theirs).abs().max() <= limit, name


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.double().nan_to_num(nan=torch.nan, neginf=0.0).flatten() for x in tensors])


def layout_of(
    lengths: Sequence[int],
    positions: Sequence[Sequence[int]] | None = None,
    valid: Tensor | None = None,
) -> Layout:
    return Layout.from_lengths(lengths, positions, valid, device=DEVICE)


def some_valid(num_tokens: int, share: float) -> Tensor:
    return torch.rand(num_tokens, generator=torch.Generator().manual_seed(1)) < share


@st.composite
def cases(data: st.DrawFn, longest: int = 40) -> tuple[Layout, dict[str, Any]]:
    lengths = data(st.lists(st.integers(0, longest), min_size=1, max_size=3))
    positions = [
        data(st.lists(st.integers(0, n - 1), max_size=n, unique=True)) if n else [] for n in lengths
    ]
    valid = data(st.none() | st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    flags = None if valid is None else torch.tensor(valid, dtype=torch.bool)
    dilation = data(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    return layout_of(lengths, positions, flags), {
        "radius": data(st.integers(1, 40)),
        "dtype": data(st.sampled_from(DTYPES)),
        "num_heads": len(dilation),
        "dilation": dilation,
        "causal": data(st.booleans()),
        "dropout_p": data(st.sampled_from([0.0, 0.3])),
    }


class Attend(torch.nn.Module):
    """A call of the operation in a graph."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, self.layout, RADIUS, implementation="fused") * 2


def our_nodes(graph: torch.fx.GraphModule) -> list[str]:
    nodes = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    return [node for node in nodes if "longhaul" in node]


class TestKernels:
    __test__ = CAN_RUN

    @pytest.mark.parametrize("positions", GLOBALS.values(), ids=GLOBALS)
    def test_a_global_key_counts_once_wherever_it_lies(self, positions: list[int]) -> None:
        check(layout_of([LENGTH], [positions]))

    def test_no_global_key_is_seen_before_it_comes(self) -> None:
        check(layout_of([LENGTH], [[0, 15, 16, 20, 39]]), causal=True)

    @pytest.mark.parametrize("radius", [1, 16, 40])
    def test_documents_of_any_length_share_a_batch(self, radius: int) -> None:
        lengths = [0, 1, radius - 1, radius, radius + 1, 17, 0]
        check(layout_of(lengths, [[0][:n] for n in lengths]), radius)

    @pytest.mark.parametrize(
        ("causal", "dtype"),
        [(True, torch.float32), (False, torch.bfloat16), (False, torch.float16)],
        ids=str,
    )
    def test_heads_of_several_dilations(self, causal: bool, dtype: torch.dtype) -> None:
        layout = layout_of([LENGTH, 3], [[0, 17, 18], []], some_valid(43, 0.8))
        check(layout, 3, dtype, num_heads=3, dilation=[1, 4, 2], causal=causal)

    @pytest.mark.parametrize(
        ("dtype", "options"),
        [
            (torch.bfloat16, {}),
            (torch.float16, {"causal": True, "dilation": [1, 2]}),
            (torch.bfloat16, {"dilation": [1, 3], "dropout_p": 0.3}),
        ],
        ids=["plain", "causal", "dropout"],
    )
    def test_many_keys_in_16_bits(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        """Those of few keys go back in 32."""
        layout = layout_of([44, 20], [[0, 17, 43], [3]], some_valid(64, 0.9))
        check(layout, 36, dtype, num_heads=2, **options)

    @pytest.mark.parametrize("share", [0.0, 0.5])
    def test_invalid_tokens_are_no_keys_and_give_zeros(self, share: float) -> None:
        valid = some_valid(50, share).to(DEVICE)
        layout = layout_of([30, 20], [[0, 3, 29], [5]], valid)

        out, lse, *_ = check(layout)

        assert out[~valid].abs().sum() == 0
        assert (lse[~valid] == -torch.inf).all()
        assert lse[valid].isfinite().all()

    def test_what_an_invalid_token_holds_reaches_nobody(self) -> None:
        valid = some_valid(50, 0.6).to(DEVICE)
        layout = layout_of([30, 20], [[0, 3, 29], [5]], valid)
        inputs = draw(50, torch.float32)
        hurt = [x.masked_fill(~valid[:, None, None], torch.nan) for x in inputs]
        with small_tiles():
            for ours, theirs in zip(
                run(hurt, layout, RADIUS, "fused"),
                run(inputs, layout, RADIUS, "fused"),
                strict=True,
            ):
                assert torch.equal(ours, theirs)

    def test_a_document_does_not_depend_on_its_neighbours(self) -> None:
        inputs = draw(60, torch.float32)
        layout = layout_of([20, 25, 15], [[0], [0, 24], []])
        hurt = [x.clone() for x in inputs]
        for x in hurt:
            x[:20], x[45:] = torch.nan, torch.nan
        with small_tiles():
            out = window_attention(*hurt, layout, RADIUS, implementation="fused")
            expected = window_attention(*inputs, layout, RADIUS, implementation="fused")
        assert torch.equal(out[20:45], expected[20:45])

    @pytest.mark.parametrize("p", [0.25, 1.0])
    def test_dropout_drops_what_the_definition_drops(self, p: float) -> None:
        check(layout_of([7, LENGTH], [[], [0, 30]]), num_heads=2, dilation=[1, 2], dropout_p=p)

    @pytest.mark.parametrize("head_dim", [24, 128])
    def test_head_sizes(self, head_dim: int) -> None:
        inputs = draw(20, torch.float32, head_dim=head_dim)
        check(layout_of([20], [[2]]), inputs=inputs)

    @pytest.mark.parametrize("scale", [0.0, -0.5])
    def test_any_scale(self, scale: float) -> None:
        check(layout_of([LENGTH], [[2]]), 30, scale=scale)

    def test_more_parts_and_chunks_of_globals_than_one(self) -> None:
        positions = list(range(0, 60, 2))
        check(layout_of([5, 60, 9], [[], positions, [8]]), 2, torch.bfloat16)

    def test_inputs_that_are_views(self) -> None:
        """As a fused projection hands them out, and as a permutation does."""
        layout = layout_of([25, 15], [[0, 20], [14]])
        inputs = draw(40, torch.float32, num_heads=2)
        packed = torch.stack(inputs, 1).unbind(1)
        turned = [x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in inputs]
        assert turned[0].stride(-1) != 1
        with small_tiles():
            expected = run(inputs, layout, RADIUS, "fused")
            for views in (packed, turned):
                assert not any(x.is_contiguous() for x in views)
                for ours, theirs in zip(run(views, layout, RADIUS, "fused"), expected, strict=True):
                    assert torch.equal(ours, theirs)

    def test_two_backward_runs_are_equal_to_the_bit(self) -> None:
        layout = layout_of([20, 30], [[0, 10], [3]], some_valid(50, 0.9))
        inputs = draw(50, torch.bfloat16, num_heads=2)
        with small_tiles():
            first, second = (
                run(inputs, layout, RADIUS, "fused", dilation=[1, 2], dropout_p=0.1)
                for _ in range(2)
            )
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    def test_any_number_of_programs_gives_the_same(self) -> None:
        """Three tiles and three heads: blocks of two tiles and of one; and one pair a program."""
        layout = layout_of([LENGTH], [[0, 39]])
        inputs = draw(LENGTH, torch.float32, num_heads=3)
        results = []
        for num_programs in (1, 4, 100):
            with small_tiles(num_programs), poisoned_memory(), torch.no_grad():
                results.append(
                    window_attention_with_lse(*inputs, layout, RADIUS, implementation="fused")
                )
        expected = window_attention(*inputs, layout, RADIUS, implementation="reference")
        torch.testing.assert_close(results[0][0], expected)
        for other in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))

    def test_a_batch_without_tokens_gives_none(self) -> None:
        out, lse, *grads = run(draw(0, torch.float32), layout_of([0, 0]), 2, "fused")

        assert out.shape == (0, 1, 16)
        assert lse.shape == (0, 1)
        assert all(grad.shape == (0, 1, 16) for grad in grads)

    def test_nothing_of_the_size_of_the_window_is_kept(self) -> None:
        kept = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor.untyped_storage().nbytes())
            return tensor

        q, k, v = (x.requires_grad_() for x in draw(LENGTH, torch.float32))
        with small_tiles(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            window_attention(q, k, v, layout_of([LENGTH]), 30, implementation="fused")
        assert kept
        assert sum(kept) <= 5 * q.nbytes

    @pytest.mark.parametrize("p", [0.0, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_checkpointed_call_has_the_same_gradients(self, dtype: torch.dtype, p: float) -> None:
        """With dropout it drops the same when it is computed again."""
        layout = layout_of([20], [[0]])

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return window_attention(
                q, k, v, layout, RADIUS, dropout_p=p, implementation="fused"
            ).square()

        grads = []
        with small_tiles():
            for again in (False, True):
                inputs = [x.requires_grad_() for x in draw(20, dtype)]
                torch.manual_seed(3)
                out = checkpoint(attend, *inputs, use_reentrant=False) if again else attend(*inputs)
                grads.append(torch.autograd.grad(out.sum(), inputs))
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))

    def test_a_compiled_graph_sees_one_node_each_way(self) -> None:
        graphs = []

        def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
            graphs.append(our_nodes(graph))
            return make_boxed_func(graph.forward)

        module = Attend(layout_of([20], [[0]]))
        inputs = [x.requires_grad_() for x in draw(20, torch.bfloat16)]
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        results = []
        with small_tiles():
            for attend in (module, torch.compile(module, backend=backend, fullgraph=True)):
                out = attend(*inputs)
                results.append([out, *torch.autograd.grad(out.sum(), inputs)])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
        assert graphs == [
            ["longhaul.fused_attention.default"],
            ["longhaul.fused_attention_backward.default"],
        ]

    def test_an_exported_graph_sees_one_node(self) -> None:
        module = Attend(layout_of([20], [[0]]))
        inputs = draw(20, torch.float32)
        with small_tiles():
            program = torch.export.export(module, inputs)
            assert torch.equal(program.module()(*inputs), module(*inputs))
        assert our_nodes(program.graph_module) == ["longhaul.fused_attention.default"]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_decides_on_the_dtype(self, dtype: torch.dtype) -> None:
        layout = layout_of([20], [[0]])
        q, k, v = draw(20, torch.float32, num_heads=2)
        mixed = (q, k.to(dtype), v)
        cast = [x.to(dtype) for x in mixed]
        with small_tiles():
            with torch.autocast(DEVICE, dtype=dtype):
                mine = run(mixed, layout, RADIUS, "fused", dropout_p=0.2)
            expected = run(cast, layout, RADIUS, "fused", dropout_p=0.2)
        assert mine[0].dtype == dtype
        assert [x.dtype for x in mine[2:]] == [x.dtype for x in mixed]
        for ours, theirs in zip(mine, expected, strict=True):
            assert torch.equal(ours, theirs.to(ours.dtype))

    def test_the_operator_keeps_its_promises_to_torch(self) -> None:
        from longformer_core.attention.fused import window as fused

        layout = layout_of([20], [[0]])
        inputs = [x.requires_grad_() for x in draw(20, torch.float32)]
        arguments = (*inputs, layout.number, RADIUS, [1], False, 0.25, 0.0, 0, True)
        with small_tiles():
            torch.library.opcheck(fused._attend, arguments)

    def test_flops_are_counted(self) -> None:
        layout = layout_of([20])
        inputs = [x.requires_grad_() for x in draw(20, torch.float32, num_heads=2)]
        with small_tiles(), FlopCounterMode(display=False) as counter:
            out = window_attention(*inputs, layout, 20, implementation="fused")
            assert counter.get_total_flops() == 2 * 2 * 20 * 20 * 2 * 16
            out.sum().backward()
        assert counter.get_total_flops() == (2 + 7) * 2 * 20 * 20 * 2 * 16

    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(case=cases(20))
    def test_any_batch(self, case: tuple[Layout, dict[str, Any]]) -> None:
        check(case[0], **case[1])

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(case=cases())
    def test_any_batch_at_length(
        self, causal: bool, dtype: torch.dtype, case: tuple[Layout, dict[str, Any]]
    ) -> None:
        check(case[0], **(case[1] | {"dtype": dtype, "causal": causal}))

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_published_tile_sizes(self, head_dim: int, dtype: torch.dtype) -> None:
        layout = layout_of([600, 300, 1], [list(range(0, 200, 4)), [1, 299], []])
        inputs = draw(901, dtype, head_dim=head_dim)
        oracle = run([x.double() for x in inputs], layout, 150, "reference")
        eager = run_eager(inputs, layout, 150)
        with poisoned_memory():
            compare(run(inputs, layout, 150, "fused"), eager, oracle)


class TestInAProcessOfItsOwn:
    __test__ = not CAN_RUN

    def test_the_kernels_are_right(self) -> None:
        interpret(__file__, "not slow and not gpu")

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_kernels_are_right_at_length(self, dtype: torch.dtype) -> None:
        interpret(__file__, "slow and not gpu", f"at_length and {dtype}")

    @pytest.mark.slow
    def test_the_published_tiles_are_right(self) -> None:
        interpret(__file__, "slow and not gpu", "published")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"dilation": [1, 1, 2, 3]}, {"dropout_p": 0.1}],
    ids=["plain", "causal", "dilated", "dropout"],
)
def test_documents_of_real_sizes(
    options: dict[str, Any], head_dim: int, dtype: torch.dtype
) -> None:
    valid = torch.ones(6001, dtype=torch.bool)
    valid[[700, 4500]] = False
    valid[5900:] = False
    layout = Layout.from_lengths(
        [4096, 1, 1904], [[0], [], list(range(0, 600, 5))], valid, device="cuda"
    )
    inputs = tuple(x.cuda() for x in draw(6001, dtype, num_heads=4, head_dim=head_dim))
    oracle = run([x.double() for x in inputs], layout, 256, "reference", **options)
    eager = run_eager(inputs, layout, 256, **options)
    mine = run(inputs, layout, 256, "fused", **options)
    compare(mine, eager, oracle)
    with pytest.MonkeyPatch.context() as patch:
        # Here most programs have one pair of tile and head each; three have them all.
        patch.setattr("longformer_core.attention.fused.window._num_multiprocessors", lambda _: 3)
        again = run(inputs, layout, 256, "fused", **options)
    assert all(torch.equal(x, y) for x, y in zip(mine, again, strict=True))
