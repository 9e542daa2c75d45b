import math
import random
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longformer_core.attention.cross_attention import CrossAttentionCache
from longformer_core.errors import ConfigError, ShapeError
from longformer_core.layout import Layout
from tests.longformer_core.attention.test_global_attention import (
    FORMS,
    HEADS,
    WIDTH,
    Form,
    LowRank,
    draw,
    draw_states,
    projections,
)


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

    def make(
        self, visible: Tensor | None = None, form: Form = "auto", num_rows: int | None = None
    ) -> tuple[CrossAttentionCache, Tensor, Layout, list[nn.Linear]]:
        layout = Layout.from_lengths(self.lengths, visible=visible)
        states, modules = draw_states(sum(self.lengths)), projections(4)
        pairs = [(modules[0], modules[1]), (modules[2], modules[3])]
        source = CrossAttentionCache(states, layout, pairs, HEADS, num_rows=num_rows, form=form)
        return source, states, layout, modules

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("num_rows", [1, 3])
    @pytest.mark.parametrize("share", [1.0, 0.5, 0.02])
    def test_rows_attend_to_the_visible_tokens_of_their_document(
        self, num_rows: int, share: float, form: Form
    ) -> None:
        seen = torch.rand(sum(self.lengths), generator=torch.Generator().manual_seed(5)) < share
        source, states, layout, modules = self.make(seen, form, num_rows)
        q = draw(len(self.lengths) * num_rows, HEADS, WIDTH // HEADS)

        for layer in (0, 1):
            out = source.attend(layer, q, num_rows)

            pair = (modules[2 * layer], modules[2 * layer + 1])
            expected = dense_cross(q, states, layout, pair, num_rows)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5], [5, 3, 0], [1, 2], [2], []])
    def test_selected_documents_give_what_they_gave(self, kept: list[int], form: Form) -> None:
        source, *_ = self.make(None, form, 2)
        q = draw(len(self.lengths) * 2, HEADS, WIDTH // HEADS)
        before = source.attend(0, q, 2).view(len(self.lengths), 2, WIDTH)
        num_bytes = source.num_bytes

        fewer = source.select(kept)

        assert fewer.num_documents == len(kept)
        rows_kept = q.view(len(self.lengths), 2, HEADS, -1)[kept].flatten(0, 1)
        after = fewer.attend(0, rows_kept, 2).view(len(kept), 2, WIDTH)
        torch.testing.assert_close(after, before[kept])
        assert (fewer.num_bytes < num_bytes) == (len(kept) < len(self.lengths))

    @pytest.mark.parametrize("form", FORMS)
    def test_selecting_twice(self, form: Form) -> None:
        source, *_ = self.make(None, form, 1)
        q = draw(len(self.lengths), HEADS, WIDTH // HEADS)
        before = source.attend(1, q, 1)

        source = source.select([4, 0, 3]).select([2, 1])

        torch.testing.assert_close(source.attend(1, q[[3, 0]], 1), before[[3, 0]])

    @pytest.mark.parametrize("form", FORMS)
    def test_documents_that_join_and_leave_give_what_they_gave(self, form: Form) -> None:
        """Some leave, all join again behind the others, some leave again."""
        source, *_ = self.make(None, form, 2)
        joining, *_ = self.make(None, form, 2)
        q = draw(len(self.lengths), HEADS, WIDTH // HEADS)
        before = source.attend(0, q, 1)

        source.select([3, 1, 4])
        source.extend(joining)
        assert source.num_documents == 9
        names = [3, 1, 4, *range(len(self.lengths))]
        torch.testing.assert_close(source.attend(0, q[names], 1), before[names])

        places = [8, 0, 5, 3]
        source.select(places)
        names = [names[place] for place in places]
        torch.testing.assert_close(source.attend(0, q[names], 1), before[names])

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("seed", range(2))
    def test_long_random_lives_of_documents(self, seed: int, form: Form) -> None:
        """Any documents leave in any order, some of them full of NaN, and others take their slots.

        What is held is never more than twice what the documents that are there need.
        """
        pick, modules = random.Random(seed), projections(4)
        pairs = [(modules[0], modules[1]), (modules[2], modules[3])]
        texts = [draw_states(n) + i for i, n in enumerate([0, 1, 7, 30, 35, 36, 64, 65, 70, 200])]
        texts += [torch.full_like(text, torch.nan) for text in texts[1:]]
        q = draw(len(texts) * 2, HEADS, WIDTH // HEADS)
        expected = torch.cat(
            [self.source_of([t], pairs, form).attend(1, q[2 * i : 2 * i + 2], 2)
             for i, t in enumerate(texts)]
        ).view(len(texts), 2, WIDTH)  # fmt: skip
        source, names = self.source_of([texts[3]], pairs, form), [3]
        for number in range(60):
            if len(names) < 16:
                new = pick.choices(range(len(texts)), k=pick.randint(1, 4))
                source.extend(self.source_of([texts[i] for i in new], pairs, form))
                names += new
            rows = q.view(len(texts), 2, HEADS, -1)[names].flatten(0, 1)
            out = source.attend(1, rows, 2).view(len(names), 2, WIDTH)
            torch.testing.assert_close(out, expected[names], equal_nan=True)

            staying = [i for i in range(len(names)) if pick.random() < 0.8][: 1 + 19 * number % 20]
            if pick.random() < 0.3:
                pick.shuffle(staying)
            source.select(staying)
            names = [names[i] for i in staying]
            tensors = [tensor for group in source._groups for tensor in group.held.tensors]
            held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
            assert held <= 2 * source.num_bytes

    def source_of(
        self, texts: list[Tensor], pairs: list[tuple[nn.Linear, nn.Linear]], form: Form
    ) -> CrossAttentionCache:
        layout = Layout.from_lengths([len(text) for text in texts])
        return CrossAttentionCache(torch.cat(texts), layout, pairs, HEADS, num_rows=8, form=form)

    @pytest.mark.parametrize(("form", "copies"), [("projected", 2 * 2), ("absorbed", 1)])
    def test_each_document_is_held_once_with_little_padding(self, form: Form, copies: int) -> None:
        source, *_ = self.make(None, form)

        exact = sum(self.lengths) * WIDTH * 4 * copies
        assert exact <= source.num_bytes <= 1.2 * exact

    @pytest.mark.parametrize("num_rows", [None, 8, 16])
    def test_each_document_takes_the_cheaper_form(self, num_rows: int | None) -> None:
        """Of 8 rows those with 32 tokens or more: 8 (4 n + 32) against n (32 + 8)."""
        source, *_ = self.make(None, "auto", num_rows)

        absorbed = (300 + 290 + 40) * WIDTH * 4 if num_rows == 8 else 0
        projected = (6 if absorbed else 636) * WIDTH * 4 * 4
        assert absorbed + projected <= source.num_bytes <= 1.2 * (absorbed + projected)

    def test_a_wrapped_projection_keeps_its_effect(self) -> None:
        layout = Layout.from_lengths([100])
        states, (key, value) = draw_states(100), projections(2)
        wrapped = LowRank(WIDTH, WIDTH)
        wrapped.load_state_dict(key.state_dict())
        q = draw(1, HEADS, WIDTH // HEADS)

        out = CrossAttentionCache(states, layout, [(wrapped, value)], HEADS, num_rows=1).attend(
            0, q, 1
        )

        plain = CrossAttentionCache(states, layout, [(key, value)], HEADS, num_rows=1).attend(
            0, q, 1
        )
        assert (out - plain).abs().max() > 0.1
        with pytest.raises(ConfigError, match="not LowRank and Linear"):
            CrossAttentionCache(states, layout, [(wrapped, value)], HEADS, form="absorbed")

    @pytest.mark.parametrize("form", FORMS)
    def test_it_holds_nothing_of_documents_that_left(self, form: Form) -> None:
        source, states, *_ = self.make(None, form, 1)
        held = weakref.ref(states.untyped_storage())
        assert held() is not None
        del states

        source.select([])

        assert source.num_bytes == 0
        assert held() is None

    @pytest.mark.parametrize("form", FORMS)
    def test_non_finite_numbers_stay_in_their_document(self, form: Form) -> None:
        layout = Layout.from_lengths([20, 18, 19])
        states, modules = draw_states(57), projections(2)
        q = draw(3, HEADS, WIDTH // HEADS)
        pairs = [(modules[0], modules[1])]
        clean = CrossAttentionCache(states, layout, pairs, HEADS, num_rows=1, form=form).attend(
            0, q, 1
        )
        states[20:38] = torch.nan

        out = CrossAttentionCache(states, layout, pairs, HEADS, num_rows=1, form=form).attend(
            0, q, 1
        )

        assert out[1].isnan().all()
        torch.testing.assert_close(out[[0, 2]], clean[[0, 2]])

    def test_rows_that_do_not_fit_are_named(self) -> None:
        source, *_ = self.make()

        with pytest.raises(ShapeError, match="7 rows cannot be 2 for each of 6 documents"):
            source.attend(0, draw(7, HEADS, WIDTH // HEADS), 2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    rows_per_document=st.integers(1, 5),
    form=st.sampled_from(FORMS),
    data=st.data(),
)
def test_any_source_and_all_gradients(
    lengths: list[int], rows_per_document: int, form: Form, data: st.DataObject
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
            pairs = [(key, value)]
            source = CrossAttentionCache(
                states, layout, pairs, HEADS, num_rows=rows_per_document, form=form
            )
            out = source.attend(0, q, rows_per_document)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        assert key.bias.grad.norm() <= 1e-9 * (1 + key.weight.grad.norm())
        grads = [key.weight.grad, value.weight.grad, value.bias.grad]
        results.append([out.detach(), q.grad, states.grad, *grads])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
