"""The two forms of the decoder's cross-attention, at the geometry of the base models.

    python -m tests.bench.cross_attention [--rounds 9] [--threads 2]

One layer and one document of 1k, 4k and 16k tokens, one row (greedy) and four (beams). Outputs are
compared first. Then the time to prepare the document and the time of a step in either form, and
after how many steps the projected form, which prepares more, has caught up: measured, and by the
flops that `CrossAttentionCache` goes by.
"""

import torch
from torch import Tensor, nn

from longformer_core import Layout
from longformer_core.attention.cross_attention import CrossAttentionCache
from longformer_core.attention.global_attention import Form
from tests.bench.measure import alternate, distance, emit, settings

D, HEADS = 768, 12
FORMS: tuple[Form, ...] = ("projected", "absorbed")


@torch.inference_mode()
def bench(num_tokens: int, num_rows: int, rounds: int) -> None:
    states, layout = torch.randn(num_tokens, D), Layout.from_lengths([num_tokens])
    pairs = [(nn.Linear(D, D), nn.Linear(D, D))]
    q = torch.randn(num_rows, HEADS, D // HEADS)

    def prepare(form: Form) -> CrossAttentionCache:
        return CrossAttentionCache(states, layout, pairs, HEADS, form=form)

    ready = {form: prepare(form) for form in FORMS}

    def step(form: Form) -> Tensor:
        return ready[form].attend(0, q, num_rows)

    error = distance(step("absorbed"), step("projected"))
    assert error < 1e-5, f"the outputs differ by {error}: no speed is printed"
    prepared = alternate({form: lambda form=form: prepare(form) for form in FORMS}, rounds)
    stepped = alternate({form: lambda form=form: step(form) for form in FORMS}, 4 * rounds)
    saved = prepared["projected"] - prepared["absorbed"]
    lost = stepped["absorbed"] - stepped["projected"]
    emit(
        "cross-attention",
        f"{num_tokens} tokens, {num_rows} rows",
        step_absorbed_over_projected=stepped["absorbed"] / stepped["projected"],
        steps_until_equal=saved / lost if lost > 0 else None,
        steps_until_equal_by_flops=num_tokens * D / ((HEADS - 1) * num_tokens + D) / num_rows,
        bytes_projected=ready["projected"].num_bytes,
        bytes_absorbed=ready["absorbed"].num_bytes,
        rounds=rounds,
    )


def main() -> None:
    given = settings(__doc__, rounds=9)
    for num_tokens in (1024, 4096, 16384):
        for num_rows in (1, 4):
            bench(num_tokens, num_rows, given.rounds)


if __name__ == "__main__":
    main()
