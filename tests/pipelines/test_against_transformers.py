"""The job's summaries are transformers' own, token for token, on real long documents.

The oracle is looked at first: its outputs must differ from document to document, and must change
when a document loses its second half or its global token. Otherwise agreement would mean nothing.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, LEDForConditionalGeneration

from longformer_core import Engine, LEDTokenizerFast, Tokens
from longformer_core import LEDForConditionalGeneration as OurLED
from tests.helpers import corpus_texts, data_folder, make_led_directory
from tests.pipelines.drive import drive

LIMIT = 2048
GREEDY = {"max_new_tokens": 20, "num_beams": 1, "no_repeat_ngram_size": 3}
BEAMS = {"max_new_tokens": 20, "num_beams": 4, "no_repeat_ngram_size": 3, "length_penalty": 2.0}

Oracle = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_led_directory(
        tmp_path_factory.mktemp("oracle") / "model",
        d_model=64,
        attention_window=[32, 64],
        max_encoder_position_embeddings=LIMIT,
    )


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def oracle(model: Path, tokenizer: Any) -> Oracle:
    led = LEDForConditionalGeneration.from_pretrained(model).eval()

    def summarize(
        ids: Sequence[int], generation: dict[str, Any], *, with_global: bool = True
    ) -> str:
        input_ids = torch.tensor([ids])
        global_attention_mask = torch.zeros_like(input_ids)
        global_attention_mask[:, 0] = int(with_global)
        generated = led.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            global_attention_mask=global_attention_mask,
            do_sample=False,
            **generation,
        )
        return str(tokenizer.batch_decode(generated, skip_special_tokens=True)[0])

    return summarize


def cut(ids: list[int], limit: int) -> list[int]:
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def run_job(tmp_path: Path, model: Path, texts: list[str], generation: dict[str, Any]) -> pa.Table:
    folder = tmp_path / "corpus"
    folder.mkdir()
    ids = [f"{i:04d}" for i in range(len(texts))]
    for part in range(2):
        table = pa.table({"id": ids[part::2], "text": texts[part::2]})
        pq.write_table(table, folder / f"{part}.parquet")
    output = tmp_path / "run"
    drive(
        corpus=str(folder),
        output=str(output),
        model=str(model),
        generation=generation,
        task={"max_source_tokens": LIMIT},
        stall_timeout_s=600.0,
    )
    return pads.dataset(str(output / "output")).to_table().sort_by("id")


def check(table: pa.Table, sources: list[list[int]], expected: list[str]) -> None:
    assert table["id"].to_pylist() == [f"{i:04d}" for i in range(len(sources))]
    assert table["error"].null_count == len(sources)
    lengths = [len(ids) for ids in sources]
    assert table["num_tokens_in"].to_pylist() == lengths
    assert table["truncated"].to_pylist() == [n > LIMIT for n in lengths]
    seen = [(min(n, LIMIT) - 2) / (n - 2) for n in lengths]
    assert table["coverage"].to_pylist() == pytest.approx(seen, abs=1e-12)
    assert table["summary"].to_pylist() == expected


@pytest.mark.parametrize("generation", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_twenty_documents(
    ray_session: None,
    tmp_path: Path,
    model: Path,
    tokenizer: Any,
    oracle: Oracle,
    generation: dict[str, Any],
) -> None:
    texts = corpus_texts(20, min_tokens=200)
    compare(tmp_path, model, tokenizer, oracle, texts, generation)


@pytest.mark.slow
@pytest.mark.parametrize("generation", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("split", ["qmsum", "proposals"])
def test_whole_splits(
    ray_session: None,
    tmp_path: Path,
    model: Path,
    tokenizer: Any,
    oracle: Oracle,
    split: str,
    generation: dict[str, Any],
) -> None:
    folder = data_folder()
    assert folder is not None, "set LONGHAUL_TEST_DATA to the folder of the corpora"
    files = sorted((folder / split).glob("validation-*.parquet"))
    texts = pads.dataset([str(f) for f in files]).to_table(columns=["text"])["text"].to_pylist()
    compare(tmp_path, model, tokenizer, oracle, texts, generation)


def compare(
    tmp_path: Path,
    model: Path,
    tokenizer: Any,
    oracle: Oracle,
    texts: list[str],
    generation: dict[str, Any],
) -> None:
    sources = [tokenizer(text)["input_ids"] for text in texts]
    inputs = [cut(ids, LIMIT) for ids in sources]
    expected = [oracle(ids, generation) for ids in inputs]
    some = slice(None, None, 4)
    halved = [oracle(cut(ids, max(3, len(ids) // 2)), generation) for ids in inputs[some]]
    local = [oracle(ids, generation, with_global=False) for ids in inputs[some]]
    # One transcript may stand in several rows of a split, with another question in front.
    assert len(set(expected)) >= 0.9 * len(texts), "the oracle says the same of different documents"
    for changed in (halved, local):
        num_changed = sum(a != b for a, b in zip(expected[some], changed, strict=True))
        assert num_changed >= 0.9 * len(changed)
    check(run_job(tmp_path, model, texts, generation), sources, expected)
    check_other_ways(model, inputs[some], expected[some], generation)


def check_other_ways(
    model: Path, inputs: list[list[int]], expected: list[str], generation: dict[str, Any]
) -> None:
    """`generate` on one document and the streamed text are the job's summaries too."""
    led = OurLED.from_pretrained(model)
    words = LEDTokenizerFast.from_pretrained(model)
    engine = Engine(led)
    options = led.generation_config.replace(**generation)
    for ids, summary in zip(inputs, expected, strict=True):
        alone = led.generate(torch.tensor([ids]), **generation)
        assert isinstance(alone, torch.Tensor)
        assert words.decode(alone[0].tolist(), skip_special_tokens=True) == summary
        events = list(engine.add(ids, options).events(timeout_s=60.0))
        streamed = [token for event in events if isinstance(event, Tokens) for token in event.ids]
        assert words.decode(streamed, skip_special_tokens=True) == summary
