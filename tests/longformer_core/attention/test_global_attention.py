import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longformer_core.attention import global_attention as rows
from longformer_core.attention.global_attention import global_attention
from longformer_core.errors import ConfigError
from longformer_core.layout import Layout
from tests.longformer_core.attention.blocked.test_attention import layouts

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
