"""The Triton kernels for few rows against a dense softmax in float64.

On a CUDA device they run as they are, elsewhere Triton's interpreter runs them in a process of
their own (see test_window.py). Tiles and splits are made small, so that short documents have
several.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from longformer_core.attention.cross_attention import CrossAttentionCache
from longformer_core.attention.fused import segments
from longformer_core.attention.fused.segments import Segments
from longformer_core.attention.global_attention import global_attention
from longformer_core.attention.philox import is_kept
from longformer_core.layout import Layout
from tests.longformer_core.attention.fused.interpreter import interpret
from tests.longformer_core.attention.fused.test_window import (
    CAN_RUN,
    DEVICE,
    IS_INTERPRETED,
    poisoned_memory,
    right_bfloat16,
    some_valid,
)

TILE = 16
FORMS: tuple[Literal["auto", "projected", "absorbed"], ...] = ("auto", "projected", "absorbed")


@contextmanager
def small_tiles() -> Iterator[None]:
    from longformer_core.attention.fused import common, few_queries

    small = common.Tiles(TILE, TILE, 4, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_queries, "_TILES", dict.fromkeys(few_queries._TILES, small))
        patch.setattr(common, "_READ", TILE)
        patch.setattr(few_queries, "_JOINED", 2)
        patch.setattr(segments, "_LEAST_KEYS", TILE)
        yield


@pytest.fixture(autouse=True)
def bfloat16() -> Iterator[None]:
    with right_bfloat16() if IS_INTERPRETED else nullcontext():
        yield


@dataclass(frozen=True)
class Batch:
    """Documents one after another: how many rows read each, how many keys it has, which count."""

    num_rows: tuple[int, ...]
    lengths: tuple[int, ...]
    valid: Tensor | None = None
    scale: float = 0.2
    dropout_p: float = 0.0

    @property
    def num_keys(self) -> int:
        return sum(self.lengths)

    def draw(
        self,
        dtype: torch.dtype = torch.float32,
        num_heads: int = 1,
        head_dim: int = 16,
        seed: int = 0,
    ) -> list[Tensor]:
        """Return rows [R, H, D], and keys and values [T, H, D]."""
        generator = torch.Generator().manual_seed(seed)
        counts = (sum(self.num_rows), self.num_keys, self.num_keys)
        return [
            torch.randn(n, num_heads, head_dim, generator=generator).to(DEVICE, dtype)
            for n in counts
        ]

    def kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from longformer_core.attention.fused.few_queries import fused_rows

        return fused_rows(
            q,
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            Segments.packed(self.num_rows, self.lengths, q.device),
            scale=self.scale,
            valid=self.valid,
            dropout_p=self.dropout_p,
        )

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Say what rows are; products in the dtype of the inputs, softmax in 32 bits or more."""
        p = self.dropout_p
        seed = int(torch.randint(2**63 - 1, ())) if p else 0
        outputs = [q[:0]]
        for rows, keys in zip(spans(self.num_rows), spans(self.lengths), strict=True):
            is_seen = torch.ones(len(keys), dtype=torch.bool, device=q.device)
            if self.valid is not None:
                is_seen = self.valid[keys]
            queries, some_keys, values = (
                x[index].transpose(0, 1) for x, index in ((q, rows), (k, keys), (v, keys))
            )
            # What nobody sees may be anything, and zero times that is not always zero.
            some_keys, values = (x.masked_fill(~is_seen[:, None], 0.0) for x in (some_keys, values))
            scores = queries @ some_keys.transpose(1, 2)
            scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * self.scale
            if is_seen.any():
                weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
            else:
                weights = scores * 0.0
            if p:
                kept = is_kept(p, seed, rows, keys, q.shape[1]).to(q.device)
                weights = weights * kept / (1 - p) if p < 1 else weights * 0.0
            outputs.append((weights.to(values.dtype) @ values).transpose(0, 1))
        return torch.cat(outputs)


def spans(counts: Sequence[int]) -> list[Tensor]:
    """Return the indices that each of several things has, one after another."""
    return [torch.arange(start, end) for start, end in pairwise(accumulate(counts, initial=0))]


def run(attend: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradients of a sum of it, unequal weights."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.manual_seed(7)
    out = attend(*leaves)
    # The same numbers in every dtype, or the oracle's gradients are of another function.
    weights = torch.linspace(-1, 1, out.numel()).bfloat16().view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out))]


def check(
    batch: Batch, inputs: Sequence[Tensor] | None = None, *, is_any: bool = False, **drawn: Any
) -> list[Tensor]:
    """Return what the kernels give, after it was found as good as `compare` asks for."""
    inputs = inputs or batch.draw(**drawn)
    oracle = run(batch.dense, [x.double() for x in inputs])
    eager = run(batch.dense, inputs)
    with small_tiles(), poisoned_memory():
        mine = run(batch.kernel, inputs)
    compare(mine, eager, oracle, is_any=is_any)
    return mine


def compare(
    mine: list[Tensor], eager: list[Tensor], oracle: list[Tensor], *, is_any: bool = False
) -> None:
    """Hold the rule: error at most twice that of the plain way in the same dtype.

    Each gradient is measured on its own, but allowed what any of them is: those of a row with a
    single key are exactly zero, and the plain way finds that by luck. In batches that may be of any
    size, of a few numbers then, the output counts among them for the same reason.
    """
    for some in (slice(None),) if is_any else (slice(0, 1), slice(1, None)):
        kinds = [x for x in zip(mine[some], eager[some], oracle[some], strict=True) if x[0].numel()]
        limit = max((2 * (plain - theirs).abs().max() for _, plain, theirs in kinds), default=0)
        limit += 1e-6 * max((theirs.abs().max() for *_, theirs in kinds), default=0)
        for ours, plain, theirs in kinds:
            assert ours.dtype == plain.dtype
            assert ours.shape == plain.shape
            assert ours.isfinite().all()
            assert (ours - theirs).abs().max() <= limit


@st.composite
def batches(
    data: st.DrawFn, longest: int = 50, most_rows: int = 40
) -> tuple[Batch, dict[str, Any]]:
    lengths = data(st.lists(st.integers(0, longest), min_size=1, max_size=3))
    num_rows = [data(st.integers(0, most_rows)) for _ in lengths]
    flags = data(st.none() | st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    valid = None if flags is None else torch.tensor(flags, dtype=torch.bool, device=DEVICE)
    dropout_p = data(st.sampled_from([0.0, 0.3]))
    return Batch(tuple(num_rows), tuple(lengths), valid, dropout_p=dropout_p), {
        "dtype": data(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "num_heads": data(st.integers(1, 2)),
    }


class TestKernels:
    __test__ = CAN_RUN

    @pytest.mark.parametrize("num_rows", [16, 40])
    def test_any_number_of_rows(self, num_rows: int) -> None:
        check(Batch((1, num_rows, 0), (5, 20, 3)))

    @pytest.mark.parametrize("length", [16, 50])
    def test_any_number_of_keys(self, length: int) -> None:
        check(Batch((3, 1), (length, 1)), num_heads=2)

    def test_rows_without_keys_give_zeros(self) -> None:
        out, *_ = check(Batch((2, 3, 1), (0, 20, 0)))
        assert out[[0, 1, 5]].abs().sum() == 0

    @pytest.mark.parametrize("share", [0.0, 0.5])
    def test_invalid_tokens_are_no_keys(self, share: float) -> None:
        valid = some_valid(57, share).to(DEVICE)
        check(Batch((2, 3, 0), (40, 7, 10), valid))

    def test_what_an_invalid_token_holds_reaches_nobody(self) -> None:
        valid = some_valid(47, 0.6).to(DEVICE)
        batch = Batch((2, 3), (40, 7), valid)
        q, k, v = batch.draw()
        hurt = [x.masked_fill(~valid[:, None, None], torch.nan) for x in (k, v)]
        with small_tiles():
            for ours, theirs in zip(
                run(batch.kernel, [q, *hurt]), run(batch.kernel, [q, k, v]), strict=True
            ):
                assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("head_dim", [24, 128])
    def test_head_sizes_and_dtypes(self, head_dim: int, dtype: torch.dtype) -> None:
        check(Batch((4,), (20,)), dtype=dtype, head_dim=head_dim)

    @pytest.mark.parametrize("scale", [0.0, -0.5])
    def test_any_scale(self, scale: float) -> None:
        check(Batch((3,), (20,), scale=scale))

    @pytest.mark.parametrize(
        ("dtype", "length", "seed"),
        [(torch.float16, 5, 4), (torch.float16, 30, 4), (torch.bfloat16, 5, 7)],
        ids=str,
    )
    def test_each_gradient_of_a_single_row_is_right(
        self, dtype: torch.dtype, length: int, seed: int
    ) -> None:
        """Its keys' gradients are small beside what rounding does to output and slopes."""
        batch = Batch((1,), (length,))
        inputs = batch.draw(dtype, seed=seed)
        oracle = run(batch.dense, [x.double() for x in inputs])
        eager = run(batch.dense, inputs)
        with small_tiles(), poisoned_memory():
            mine = run(batch.kernel, inputs)
        for one in zip(mine, eager, oracle, strict=True):
            compare(*([x] for x in one))

    def test_many_keys_in_16_bits(self) -> None:
        """Those of few keys go back in 32."""
        for dtype in (torch.bfloat16, torch.float16):
            check(Batch((2, 1), (33, 7)), dtype=dtype)

    @pytest.mark.parametrize("p", [0.25, 1.0])
    def test_dropout_drops_by_the_counters_of_rows_and_keys(self, p: float) -> None:
        check(Batch((2, 3), (9, 33), dropout_p=p), num_heads=2)

    def test_inputs_that_are_views(self) -> None:
        """As a fused projection hands them out, and as a permutation does."""
        batch = Batch((3,), (20,))
        q, k, v = batch.draw(num_heads=2)
        turned = [x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in (q, k, v)]
        assert turned[0].stride(-1) != 1
        with small_tiles():
            expected = run(batch.kernel, (q, k, v))
            for views in ([q, *torch.stack([k, v], 1).unbind(1)], turned):
                assert not views[2].is_contiguous()
                for ours, theirs in zip(run(batch.kernel, views), expected, strict=True):
                    assert torch.equal(ours, theirs)

    def test_padded_groups_are_read_as_they_lie(self) -> None:
        """Of larger tensors, whose other slots hold NaN; padding gets a gradient of zeros."""
        from longformer_core.attention.fused.few_queries import fused_rows

        lengths, rows_each = (20, 33, 0), 3
        batch = Batch((rows_each,) * 3, lengths)
        packed = batch.draw()
        wide = torch.full((2, 4, 1, 40, 16), torch.nan, device=DEVICE)
        for slot, keys in enumerate(spans(lengths)):
            wide[:, slot, :, : len(keys)] = torch.stack(packed[1:])[:, keys].transpose(1, 2)
        table = Segments.padded(lengths, 34, torch.device(DEVICE))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fused_rows(q, k, v, table, rows_each, scale=batch.scale)

        with small_tiles(), poisoned_memory():
            out, dq, *grads = run(attend, [packed[0], *wide[:, :3, :, :34]])
            expected = run(batch.kernel, packed)

        assert torch.equal(out, expected[0])
        assert torch.equal(dq, expected[1])
        for grad, other in zip(grads, expected[2:], strict=True):
            for slot, keys in enumerate(spans(lengths)):
                torch.testing.assert_close(grad[slot, :, : len(keys)].transpose(0, 1), other[keys])
                assert grad[slot, :, len(keys) :].abs().sum() == 0

    def test_two_backward_runs_are_equal_to_the_bit(self) -> None:
        batch = Batch((1, 17), (9, 20), some_valid(29, 0.9).to(DEVICE), dropout_p=0.1)
        inputs = batch.draw(torch.bfloat16)
        with small_tiles():
            first, second = run(batch.kernel, inputs), run(batch.kernel, inputs)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    def test_nothing_of_size_rows_times_keys_is_kept(self) -> None:
        kept = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor.untyped_storage().nbytes())
            return tensor

        batch = Batch((33,), (40,))
        inputs = [x.requires_grad_() for x in batch.draw()]
        with small_tiles(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            batch.kernel(*inputs)
        assert kept
        assert sum(kept) <= 5 * inputs[0].nbytes

    def test_batches_of_nothing(self) -> None:
        for batch in (Batch((), ()), Batch((0,), (5,)), Batch((2,), (0,))):
            results = run(batch.kernel, batch.draw())
            for result, like in zip(results, [batch.draw()[0], *batch.draw()], strict=True):
                assert torch.equal(result, torch.zeros_like(like))

    def test_the_operator_keeps_its_promises_to_torch(self) -> None:
        from longformer_core.attention.fused import few_queries

        batch = Batch((2,), (5,))
        q, k, v = batch.draw()
        k, v = (x.transpose(0, 1)[None] for x in (k, v))
        whole = Segments.packed((2,), (5,), q.device)
        with small_tiles():
            torch.library.opcheck(
                few_queries._attend,
                (
                    *(x.requires_grad_() for x in (q, k, v)),
                    *(whole.table, None, whole.planned, 1, 0.25, 0.0, 0, True),
                ),
            )

    def test_flops_are_counted(self) -> None:
        batch = Batch((2, 3), (20, 5))
        inputs = [x.requires_grad_() for x in batch.draw(num_heads=2)]
        pairs = 2 * 20 + 3 * 5
        with small_tiles(), FlopCounterMode(display=False) as counter:
            out = batch.kernel(*inputs)
            assert counter.get_total_flops() == 2 * 2 * pairs * 2 * 16
            out.sum().backward()
        assert counter.get_total_flops() == (2 + 7) * 2 * pairs * 2 * 16

    @settings(max_examples=3, deadline=None, derandomize=True)
    @given(case=batches(20, 18))
    def test_any_batch(self, case: tuple[Batch, dict[str, Any]]) -> None:
        check(case[0], is_any=True, **case[1])

    @pytest.mark.slow
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(case=batches())
    def test_any_batch_at_length(self, case: tuple[Batch, dict[str, Any]]) -> None:
        check(case[0], is_any=True, **case[1])

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("head_dim", [16, 64, 128])
    def test_published_tile_sizes(self, head_dim: int, dtype: torch.dtype) -> None:
        for batch in (Batch((70, 3), (700, 300)), Batch((2, 16), (700, 300))):
            inputs = batch.draw(dtype, head_dim=head_dim)
            oracle = run(batch.dense, [x.double() for x in inputs])
            eager = run(batch.dense, inputs)
            with poisoned_memory():
                compare(run(batch.kernel, inputs), eager, oracle)


HEADS, WIDTH = 2, 32


def linear(count: int) -> list[nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = [nn.Linear(WIDTH, WIDTH) for _ in range(count)]
    for module in modules:
        nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(3))
    return [module.to(DEVICE) for module in modules]


def states_of(num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, WIDTH, generator=generator).to(DEVICE)


def with_weights(
    attend: Callable[..., Tensor], states: Tensor, modules: Sequence[nn.Linear]
) -> list[Tensor]:
    """The output and its gradients to the states and all weights, but for the keys' bias.

    That adds one number to all scores of a row: its gradient is zero, or rounding.
    """
    states = states.detach().requires_grad_()
    out = attend(states)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    biases = [m.bias for m in (*modules[:-2], modules[-1])]
    leaves = [states, *(m.weight for m in modules), *biases]
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


class TestGlobalAttention:
    __test__ = CAN_RUN

    @pytest.mark.parametrize(
        ("form", "has_invalid"), [("auto", False), ("projected", True), ("absorbed", True)]
    )
    def test_it_gives_what_plain_pytorch_gives(
        self, form: Literal["auto", "projected", "absorbed"], has_invalid: bool
    ) -> None:
        """A document without global tokens lies between two with; one has few, one has many."""
        valid = some_valid(46, 0.7) if has_invalid else None
        positions = [[0, 11], [0], [], range(0, 25, 2), []]
        layout = Layout.from_lengths([12, 1, 5, 25, 3], positions, valid, device=DEVICE)
        modules = linear(3)
        results = []
        for implementation in ("blocked", "fused"):

            def attend(states: Tensor, implementation: Any = implementation) -> Tensor:
                return global_attention(
                    states, layout, *modules, HEADS, form=form, implementation=implementation
                )

            with small_tiles():
                results.append(with_weights(attend, states_of(46), modules))
        for plain, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)

    def test_all_documents_are_one_call(self) -> None:
        layout = Layout.from_lengths([9, 12, 7], [[0, 4], [], [6]], device=DEVICE)
        with small_tiles(), Noted() as noted:
            global_attention(
                states_of(28), layout, *linear(3), HEADS, form="projected", implementation="fused"
            )
        assert noted.names.count("longhaul::fused_rows") == 1

    def test_dropout_follows_torchs_generator(self) -> None:
        layout = Layout.from_lengths([30], [[0, 3]], device=DEVICE)

        def attend(seed: int) -> Tensor:
            torch.manual_seed(seed)
            return global_attention(
                states_of(30),
                layout,
                *linear(3),
                HEADS,
                form="projected",
                dropout_p=0.5,
                implementation="fused",
            )

        with small_tiles():
            assert torch.equal(attend(1), attend(1))
            assert not torch.allclose(attend(1), attend(2))

    def test_a_compiled_graph_gives_the_same(self) -> None:
        layout = Layout.from_lengths([20], [[0, 7]], device=DEVICE)
        modules = linear(3)

        def attend(states: Tensor) -> Tensor:
            return global_attention(
                states, layout, *modules, HEADS, form="projected", implementation="fused"
            )

        with small_tiles(), torch.no_grad():
            compiled = torch.compile(attend, backend="eager", fullgraph=True)
            assert torch.equal(compiled(states_of(20)), attend(states_of(20)))


class Noted(TorchDispatchMode):
    """Notes the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **kwargs or {})


class TestSource:
    __test__ = CAN_RUN

    # Two groups: the first two long ones, and the others.
    lengths = (44, 5, 0, 40, 9, 1)

    def make(
        self, implementation: Any, form: Literal["auto", "projected", "absorbed"] = "projected"
    ) -> CrossAttentionCache:
        visible = some_valid(sum(self.lengths), 0.9)
        layout = Layout.from_lengths(self.lengths, visible=visible, device=DEVICE)
        modules = linear(4)
        pairs = [(modules[0], modules[1]), (modules[2], modules[3])]
        states = states_of(sum(self.lengths))
        return CrossAttentionCache(
            states, layout, pairs, HEADS, num_rows=2, form=form, implementation=implementation
        )

    def rows(self, num_documents: int, num_rows: int = 1) -> Tensor:
        return states_of(num_documents * num_rows).view(-1, HEADS, WIDTH // HEADS)

    @pytest.mark.parametrize("form", FORMS)
    @torch.inference_mode()
    def test_it_gives_what_plain_pytorch_gives(
        self, form: Literal["auto", "projected", "absorbed"]
    ) -> None:
        """At first, with fewer documents, and with others behind them."""
        with small_tiles():
            results: list[list[Tensor]] = [[], []]
            for found, name in zip(results, ("blocked", "fused"), strict=True):
                source = self.make(name, form)
                found.append(source.attend(0, self.rows(6, 2), 2))
                source.select([4, 2, 0])
                found.append(source.attend(1, self.rows(3, 3), 3))
                source.extend(self.make(name, form))
                found.append(source.attend(1, self.rows(9), 1))
        for plain, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)

    def test_gradients_are_those_of_plain_pytorch(self) -> None:
        lengths, results = (20, 18, 0), []
        layout = Layout.from_lengths(lengths, device=DEVICE)
        pair = linear(2)
        for implementation in ("blocked", "fused"):

            def attend(states: Tensor, implementation: Any = implementation) -> Tensor:
                pairs = [(pair[0], pair[1])]
                source = CrossAttentionCache(
                    states, layout, pairs, HEADS, implementation=implementation
                )
                return source.attend(0, states[:9].view(9, HEADS, -1), 3)

            with small_tiles():
                results.append(with_weights(attend, states_of(38), pair))
        for plain, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)

    @torch.inference_mode()
    def test_a_step_makes_no_tables_and_waits_for_nothing(self) -> None:
        source = self.make("fused")
        rows = self.rows(6)
        with small_tiles(), Noted() as noted:
            source.attend(0, rows, 1)
        assert noted.names.count("longhaul::fused_rows") == len(source._groups) == 2
        own = {"view", "view_as", "flatten", "slice", "index_select", "cat"}
        assert set(noted.names) - {"longhaul::fused_rows"} <= {f"aten::{name}" for name in own}


class TestInAProcessOfItsOwn:
    __test__ = not CAN_RUN

    def test_the_kernels_are_right(self) -> None:
        interpret(__file__, "not slow and not gpu")

    @pytest.mark.slow
    def test_the_kernels_are_right_at_length(self) -> None:
        interpret(__file__, "slow and not gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_documents_of_real_sizes(dropout_p: float, head_dim: int, dtype: torch.dtype) -> None:
    valid = some_valid(25001, 0.95).cuda()
    for num_rows in ((1, 4, 2, 1), (300, 0, 3, 1)):
        batch = Batch(num_rows, (16384, 0, 8616, 1), valid, head_dim**-0.5, dropout_p)
        inputs = [x.cuda() for x in batch.draw(dtype, num_heads=4, head_dim=head_dim)]
        oracle = run(batch.dense, [x.double() for x in inputs])
        eager = run(batch.dense, inputs)
        mine, again = (run(batch.kernel, inputs) for _ in range(2))
        compare(mine, eager, oracle)
        assert all(torch.equal(x, y) for x, y in zip(mine, again, strict=True))
