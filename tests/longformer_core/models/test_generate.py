"""`generate` against the published one: ids, scores, padding, masks, streamers, options' files."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from longformer_core.errors import ConfigError, ShapeError, log_once
from longformer_core.generation.config import GenerationConfig
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.models.outputs import LEDGenerateOutput
from tests.longformer_core.generation.helpers import documents, models

LENGTHS = (30, 12, 45)
OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 16},
    {"max_length": 17, "num_beams": 4, "num_return_sequences": 3, "early_stopping": True},
    {"max_new_tokens": 12, "num_beams": 2, "no_repeat_ngram_size": 2, "min_length": 6},
]


def batch(marks: tuple[int, ...] = (0,), *, is_left: bool = False) -> dict[str, Tensor]:
    """A padded batch whose documents have these global tokens."""
    texts = documents(3, *LENGTHS)
    ids = torch.full((len(texts), max(LENGTHS) + 3), 1)
    mask, is_global = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, text in enumerate(texts):
        first = ids.shape[1] - len(text) if is_left else 0
        ids[row, first : first + len(text)] = torch.tensor(text)
        mask[row, first : first + len(text)] = 1
        is_global[row, [first + place for place in marks]] = 1
    return {"input_ids": ids, "attention_mask": mask, "global_attention_mask": is_global}


@pytest.mark.parametrize("options", OPTIONS)
def test_ids_scores_and_beam_indices_are_the_published_ones(options: dict[str, Any]) -> None:
    for seed in (1, 3):
        ours, theirs = models(seed)
        inputs = batch((0, 5))
        expected = theirs.generate(
            **inputs, **options, return_dict_in_generate=True, output_scores=True
        )
        got = ours.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
        assert isinstance(got, LEDGenerateOutput)
        assert torch.equal(got["sequences"], expected.sequences)
        assert torch.equal(ours.generate(**inputs, **options), expected.sequences)
        assert got.scores is not None
        assert got.sequences_scores is not None
        running = 0
        for mine, published in zip(got.scores, expected.scores, strict=True):
            row_runs = mine.isfinite().any(-1)
            running += int(row_runs.sum())
            torch.testing.assert_close(mine[row_runs], published[row_runs], atol=1e-4, rtol=1e-4)
        assert running > len(LENGTHS)
        if options.get("num_beams", 1) > 1:
            torch.testing.assert_close(got.sequences_scores, expected.sequences_scores)
            assert torch.equal(got.beam_indices, expected.beam_indices[:, : got.sequences.shape[1]])


def test_padding_is_found_without_a_mask_and_on_either_side() -> None:
    ours, theirs = models(1)
    inputs = batch()
    expected = theirs.generate(**inputs, **OPTIONS[1])
    del inputs["attention_mask"]
    assert torch.equal(ours.generate(**inputs, **OPTIONS[1]), expected)
    assert torch.equal(ours.generate(**batch(is_left=True), **OPTIONS[1]), expected)


def test_tokens_hidden_inside_a_document_are_hidden_as_published() -> None:
    ours, theirs = models(3)
    inputs = batch()
    shown = ours.generate(**inputs, **OPTIONS[0])
    inputs["attention_mask"][:, 4:9] = 0
    hidden = ours.generate(**inputs, **OPTIONS[0])
    assert torch.equal(hidden, theirs.generate(**inputs, **OPTIONS[0]))
    assert not torch.equal(hidden, shown)


def test_the_first_token_is_global_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = models(1)
    inputs = batch()
    marks = inputs.pop("global_attention_mask")
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        first = ours.generate(**inputs, **OPTIONS[1])
        ours.generate(**inputs, **OPTIONS[1])
    assert len([r for r in caplog.records if "first token" in r.message]) == 1
    expected = theirs.generate(**inputs, global_attention_mask=marks, **OPTIONS[1])
    assert torch.equal(first, expected)
    local = ours.generate(**inputs, first_token_global=False, **OPTIONS[1])
    assert torch.equal(local, theirs.generate(**inputs, **OPTIONS[1]))
    assert not torch.equal(local, first)


def test_a_seed_gives_the_published_text_of_manual_seed() -> None:
    ours, theirs = models(2)
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 30, "temperature": 1.3}
    inputs = {name: value[:1] for name, value in batch().items()}
    texts = set()
    for seed in range(6):
        torch.manual_seed(seed)
        expected = theirs.generate(**inputs, **options)
        assert torch.equal(ours.generate(**inputs, seed=seed, **options), expected)
        texts.add(tuple(expected[0].tolist()))
    assert len(texts) >= 3
    torch.manual_seed(5)
    one = ours.generate(**batch(), **options)
    torch.manual_seed(5)
    assert torch.equal(ours.generate(**batch(), **options), one)


class Notes:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.is_ended = False

    def put(self, value: Tensor) -> None:
        assert not self.is_ended
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.is_ended = True


@pytest.mark.parametrize("options", OPTIONS)
def test_a_streamer_gets_the_best_sequence_bit_by_bit(options: dict[str, Any]) -> None:
    options = options | {"num_return_sequences": 1}
    most = 0
    for seed, row in itertools.product((1, 3, 10), range(len(LENGTHS))):
        ours, _ = models(seed)
        inputs = {name: value[row : row + 1] for name, value in batch().items()}
        notes = Notes()
        text = ours.generate(**inputs, streamer=notes, **options)
        assert list(itertools.chain(*notes.parts)) == text[0].tolist()
        assert notes.is_ended
        most = max(most, len(notes.parts))
    assert most > 3
    with pytest.raises(ShapeError, match="one document; 3"):
        ours.generate(**batch(), streamer=Notes(), **options)


def test_it_decodes_without_dropout_and_leaves_the_mode_alone() -> None:
    ours, _ = models(1)
    expected = ours.generate(**batch(), **OPTIONS[0])
    ours.train()
    try:
        assert torch.equal(ours.generate(**batch(), **OPTIONS[0]), expected)
        assert ours.training
    finally:
        ours.eval()


def test_what_is_wrong_is_said() -> None:
    ours, _ = models(0)
    inputs = batch()
    with pytest.raises(ConfigError, match=r"no option 'num_beam' .*'num_beams'"):
        ours.generate(**inputs, num_beam=4)
    with pytest.raises(ShapeError, match=r"give \[documents, tokens\]"):
        ours.generate(inputs["input_ids"][0])
    with pytest.raises(ShapeError, match="attention_mask has shape"):
        ours.generate(inputs["input_ids"], inputs["attention_mask"][:, 1:])
    with pytest.raises(ShapeError, match="negative at tokens"):
        ours.generate(inputs["input_ids"], None, -inputs["attention_mask"])
    with pytest.raises(ShapeError, match="no tokens"):
        ours.generate(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ShapeError, match="2 seeds for 3"):
        ours.generate(**inputs, do_sample=True, seed=[1, 2])


def test_options_travel_with_the_directory(tmp_path: Path) -> None:
    ours, _ = models(1)
    ours.generation_config = GenerationConfig(num_beams=3, max_new_tokens=9)
    try:
        ours.save_pretrained(tmp_path / "one")
    finally:
        ours._generation_config = None
    loaded = LEDForConditionalGeneration.from_pretrained(tmp_path / "one")
    assert loaded.generation_config == GenerationConfig(num_beams=3, max_new_tokens=9)
    published = transformers.LEDForConditionalGeneration.from_pretrained(tmp_path / "one")
    expected = published.generate(**batch())
    assert torch.equal(loaded.generate(**batch()), expected)
    # Options that nobody here can decode with are kept for those who can.
    path = tmp_path / "one" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"penalty_alpha": 0.6}))
    loaded = LEDForConditionalGeneration.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert json.loads((tmp_path / "two" / path.name).read_text())["penalty_alpha"] == 0.6
    with pytest.raises(ConfigError, match="penalty_alpha"):
        loaded.generate(**batch())
