import math
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longformer_core.attention import rows
from longformer_core.attention.rows import Source, global_attention, is_plain_linear
from longformer_core.errors import ConfigError, ShapeError
from longformer_core.layout import Layout
from tests.longformer_core.attention.test_blocked import layouts

HEADS, WIDTH = 4, 32
Form = Literal["auto", "projected", "absorbed"]
FORMS: tuple[Form, ...] = ("auto", "projected", "absorbed")


def projections(count: int, dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = [nn.Linear(WIDTH, WIDTH).to(dtype) for _ in range(count)]
    for module in modules:
        nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(3))
    return modules


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype) * 2


def draw_states(num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return draw(num_tokens, WIDTH, dtype=dtype)


def dense_rows(states: Tensor, layout: Layout, modules: list[nn.Linear]) -> Tensor:
    """Say in loops and float64 what global rows are."""
    q, k, v = (
        (states.double() @ m.weight.double().T + m.bias.double()).view(-1, HEADS, WIDTH // HEADS)
        for m in modules
    )
    out = []
    for document, positions in enumerate(layout.global_positions):
        keys = torch.arange(layout.cu_seqlens[document], layout.cu_seqlens[document + 1])
        first = layout.cu_seqlens[document]
        if layout.is_valid is not None:
            keys = keys[layout.is_valid[keys]]
        for position in positions:
            scores = torch.einsum("hd,nhd->hn", q[first + position], k[keys])
            weights = (scores / math.sqrt(WIDTH // HEADS)).softmax(-1)
            out.append(torch.einsum("hn,nhd->hd", weights, v[keys]).flatten())
    return torch.stack(out)


class LowRank(nn.Linear):
    """A wrapped projection: using its weight alone would miss what it adds."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 3 * input.flip(-1)


class TestGlobalAttention:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("has_invalid", [False, True])
    def test_it_is_full_attention_of_the_global_tokens(self, form: Form, has_invalid: bool) -> None:
        valid = torch.rand(60, generator=torch.Generator().manual_seed(2)) < 0.6
        positions = [[0, 19], [0], [], range(0, 39, 2)]
        layout = Layout.from_lengths([20, 1, 0, 39], positions, valid if has_invalid else None)
        states, modules = draw_states(60), projections(3)

        out = global_attention(states, layout, *modules, HEADS, form=form)

        expected = dense_rows(states, layout, modules)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)

    def test_forms_agree_to_rounding(self) -> None:
        layout = Layout.from_lengths([33, 7], [[0, 5, 32], [6]])
        states, modules = draw_states(40, dtype=torch.float64), projections(3, torch.float64)

        auto, projected, absorbed = (
            global_attention(states, layout, *modules, HEADS, form=form) for form in FORMS
        )

        torch.testing.assert_close(absorbed, projected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(auto, projected, rtol=1e-12, atol=1e-12)

    def test_the_cheaper_form_is_taken_for_each_document(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken: dict[str, list[int]] = {"absorbed": [], "projected": []}
        absorbed, projected = rows._absorbed, rows._projected

        def note_absorbed(documents: list[rows._Document], *modules: nn.Module) -> object:
            taken["absorbed"] += [len(document.queries) for document in documents]
            return absorbed(documents, *modules)

        def note_projected(document: rows._Document, *modules: nn.Module) -> Tensor:
            taken["projected"].append(len(document.queries))
            return projected(document, *modules)

        monkeypatch.setattr(rows, "_absorbed", note_absorbed)
        monkeypatch.setattr(rows, "_projected", note_projected)
        layout = Layout.from_lengths([100, 100, 50], [[0], range(40), []])

        global_attention(draw_states(250), layout, *projections(3), HEADS)

        assert taken == {"absorbed": [1], "projected": [40]}

    def test_a_wrapped_projection_keeps_its_effect(self) -> None:
        layout = Layout.from_lengths([100], [[0]])
        states, (query, key, value) = draw_states(100), projections(3)
        wrapped = LowRank(WIDTH, WIDTH)
        wrapped.load_state_dict(key.state_dict())

        out = global_attention(states, layout, query, wrapped, value, HEADS)

        expected = global_attention(states, layout, query, wrapped, value, HEADS, form="projected")
        torch.testing.assert_close(out, expected)
        plain = global_attention(states, layout, query, key, value, HEADS)
        assert (out - plain).abs().max() > 0.1
        with pytest.raises(ConfigError, match="not LowRank and Linear"):
            global_attention(states, layout, query, wrapped, value, HEADS, form="absorbed")

    def test_a_hooked_projection_is_not_plain(self) -> None:
        module = nn.Linear(2, 2)
        assert is_plain_linear(module)
        handle = module.register_forward_hook(lambda *_: None)
        assert not is_plain_linear(module)
        handle.remove()
        assert is_plain_linear(module)
        nn.utils.parametrizations.weight_norm(module)
        assert not is_plain_linear(module)

    def test_gradients_of_both_forms_agree(self) -> None:
        layout = Layout.from_lengths([30, 9], [[0, 4], [8]])
        gradients = []
        for form in FORMS[1:]:
            states = draw_states(39, dtype=torch.float64).requires_grad_()
            modules = projections(3, torch.float64)
            out = global_attention(states, layout, *modules, HEADS, form=form)
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            weights = [m.weight.grad for m in modules]
            gradients.append([states.grad, *weights, modules[0].bias.grad, modules[2].bias.grad])

        for absorbed, projected in zip(*gradients, strict=True):
            torch.testing.assert_close(absorbed, projected, rtol=1e-9, atol=1e-12)


def dense_cross(
    q: Tensor, states: Tensor, layout: Layout, pair: tuple[nn.Linear, nn.Linear], num_rows: int
) -> Tensor:
    keys, values = (m(states).view(-1, HEADS, WIDTH // HEADS) for m in pair)
    out = torch.zeros(len(q), WIDTH)
    for row in range(len(q)):
        start, end = layout.cu_seqlens[row // num_rows : row // num_rows + 2]
        index = torch.arange(start, end)
        if layout.is_visible is not None:
            index = index[layout.is_visible[index]]
        if len(index):
            scores = torch.einsum("hd,nhd->hn", q[row], keys[index])
            weights = (scores / math.sqrt(WIDTH // HEADS)).softmax(-1)
            out[row] = torch.einsum("hn,nhd->hd", weights, values[index]).flatten()
    return out


class TestSource:
    @pytest.fixture(autouse=True)
    def no_grad(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    lengths = (300, 5, 0, 290, 40, 1)

    def make(self, visible: Tensor | None = None) -> tuple[Source, Tensor, Layout, list[nn.Linear]]:
        layout = Layout.from_lengths(self.lengths, visible=visible)
        states, modules = draw_states(sum(self.lengths)), projections(4)
        pairs = [(modules[0], modules[1]), (modules[2], modules[3])]
        return Source(states, layout, pairs, HEADS), states, layout, modules

    @pytest.mark.parametrize("num_rows", [1, 3])
    @pytest.mark.parametrize("share", [1.0, 0.5, 0.02])
    def test_rows_attend_to_the_visible_tokens_of_their_document(
        self, num_rows: int, share: float
    ) -> None:
        seen = torch.rand(sum(self.lengths), generator=torch.Generator().manual_seed(5)) < share
        source, states, layout, modules = self.make(seen)
        q = draw(len(self.lengths) * num_rows, HEADS, WIDTH // HEADS)

        for layer in (0, 1):
            out = source.attend(layer, q, num_rows)

            pair = (modules[2 * layer], modules[2 * layer + 1])
            expected = dense_cross(q, states, layout, pair, num_rows)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5], [5, 3, 0], [1, 2], [2], []])
    def test_selected_documents_give_what_they_gave(self, kept: list[int]) -> None:
        source, *_ = self.make()
        q = draw(len(self.lengths) * 2, HEADS, WIDTH // HEADS)
        before = source.attend(0, q, 2).view(len(self.lengths), 2, WIDTH)
        num_bytes = source.num_bytes

        fewer = source.select(torch.tensor(kept, dtype=torch.int64))

        assert fewer.num_documents == len(kept)
        rows_kept = q.view(len(self.lengths), 2, HEADS, -1)[kept].flatten(0, 1)
        after = fewer.attend(0, rows_kept, 2).view(len(kept), 2, WIDTH)
        torch.testing.assert_close(after, before[kept])
        assert (fewer.num_bytes < num_bytes) == (len(kept) < len(self.lengths))

    def test_selecting_twice(self) -> None:
        source, *_ = self.make()
        q = draw(len(self.lengths), HEADS, WIDTH // HEADS)
        before = source.attend(1, q, 1)

        source = source.select(torch.tensor([4, 0, 3])).select(torch.tensor([2, 1]))

        torch.testing.assert_close(source.attend(1, q[[3, 0]], 1), before[[3, 0]])

    def test_each_document_is_held_once_with_little_padding(self) -> None:
        source, *_ = self.make()

        exact = sum(self.lengths) * WIDTH * 4 * 2 * 2
        assert exact <= source.num_bytes <= 1.2 * exact

    def test_non_finite_numbers_stay_in_their_document(self) -> None:
        layout = Layout.from_lengths([20, 18, 19])
        states, modules = draw_states(57), projections(2)
        q = draw(3, HEADS, WIDTH // HEADS)
        clean = Source(states, layout, [(modules[0], modules[1])], HEADS).attend(0, q, 1)
        states[20:38] = torch.nan

        out = Source(states, layout, [(modules[0], modules[1])], HEADS).attend(0, q, 1)

        assert out[1].isnan().all()
        torch.testing.assert_close(out[[0, 2]], clean[[0, 2]])

    def test_rows_that_do_not_fit_are_named(self) -> None:
        source, *_ = self.make()

        with pytest.raises(ShapeError, match="7 rows cannot be 2 for each of 6 documents"):
            source.attend(0, draw(7, HEADS, WIDTH // HEADS), 2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layout=layouts(), form=st.sampled_from(FORMS))
def test_any_batch_and_all_gradients(layout: Layout, form: Form) -> None:
    results = []
    for oracle in (True, False):
        states = draw_states(layout.num_tokens, dtype=torch.float64).requires_grad_()
        modules = projections(3, torch.float64)
        if oracle:
            if not any(layout.num_globals):
                return
            out = dense_rows(states, layout, modules)
        else:
            out = global_attention(states, layout, *modules, HEADS, form=form)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        names = [(m, name) for m in modules for name in ("weight", "bias")]
        # The key's bias adds a constant to every score of a row: no gradient, or rounding.
        grads = [getattr(m, n).grad for m, n in names if (m, n) != (modules[1], "bias")]
        results.append([out.detach(), states.grad, *grads])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    rows_per_document=st.integers(1, 5),
    data=st.data(),
)
def test_any_source_and_all_gradients(
    lengths: list[int], rows_per_document: int, data: st.DataObject
) -> None:
    total = sum(lengths)
    flags = data.draw(st.none() | st.lists(st.booleans(), min_size=total, max_size=total))
    visible = None if flags is None else torch.tensor(flags, dtype=torch.bool)
    layout = Layout.from_lengths(lengths, visible=visible)
    results = []
    for oracle in (True, False):
        states = draw_states(total, dtype=torch.float64).requires_grad_()
        key, value = projections(2, torch.float64)
        head_dim = WIDTH // HEADS
        q = draw(len(lengths) * rows_per_document, HEADS, head_dim, dtype=torch.float64)
        q.requires_grad_()
        if oracle:
            parts, first = [], 0
            seen = torch.ones(total, dtype=torch.bool) if visible is None else visible
            for document, length in enumerate(lengths):
                chosen = states[first : first + length][seen[first : first + length]]
                first += length
                k, v = (m(chosen).view(-1, HEADS, head_dim) for m in (key, value))
                start = document * rows_per_document
                scores = torch.einsum("rhd,nhd->hrn", q[start : start + rows_per_document], k)
                weights = (scores / math.sqrt(head_dim)).softmax(-1)
                parts.append(torch.einsum("hrn,nhd->rhd", weights, v).flatten(1))
            out = torch.cat(parts)
        else:
            source = Source(states, layout, [(key, value)], HEADS)
            out = source.attend(0, q, rows_per_document)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        grads = [key.weight.grad, value.weight.grad, value.bias.grad]
        results.append([out.detach(), q.grad, states.grad, *grads])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
