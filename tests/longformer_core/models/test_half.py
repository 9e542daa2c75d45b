"""In 16 bits the models are as near to float32 as the published ones are."""

import copy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from longformer_core.ops import linear
from tests.longformer_core.models import test_led_published, test_longformer
from tests.longformer_core.models.published import batch, difference, pair

NUM_INPUTS = 48


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


@torch.no_grad()
@pytest.mark.parametrize("family", ["Longformer", "LED"])
def test_bfloat16_is_as_near_as_the_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    config = (test_longformer if family == "Longformer" else test_led_published).CONFIG
    published, ours = pair(tmp_path, f"{family}Model", config)
    theirs_half, ours_half = (copy.deepcopy(m).to(torch.bfloat16) for m in (published, ours))
    theirs: list[float] = []
    # With products in float32, and as asked for.
    mine: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(NUM_INPUTS):
        inputs: dict[str, Any] = batch((80, 33), seed)
        marks = torch.zeros_like(inputs["input_ids"])
        marks[:, [0, 9]] = 1
        inputs["global_attention_mask"] = marks
        if family == "LED":
            inputs["decoder_input_ids"] = test_led_published.targets(2, seed=seed)
        exact = published(**inputs).last_hidden_state
        theirs.append(difference(theirs_half(**inputs).last_hidden_state, exact))
        for is_slow, errors in mine.items():
            monkeypatch.setattr(linear, "multiplies_bfloat16_slowly", lambda slow=is_slow: slow)
            states = ours_half(**inputs).last_hidden_state
            assert states.dtype == torch.bfloat16
            errors.append(difference(states, exact))
    assert 1e-3 < statistics.median(theirs) < 0.2, "the oracle sees no rounding"
    for errors in mine.values():
        assert statistics.median(errors) <= 1.1 * statistics.median(theirs)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Longformer", "LED"])
def test_float16_does_not_overflow(tmp_path: Path, family: str) -> None:
    config = (test_longformer if family == "Longformer" else test_led_published).CONFIG
    _, ours = pair(tmp_path, f"{family}Model", config)
    ours.to(torch.float16)
    inputs: dict[str, Any] = batch((60, 33))
    if family == "LED":
        inputs["decoder_input_ids"] = test_led_published.targets(2)
    assert ours(**inputs).last_hidden_state.isfinite().all()
