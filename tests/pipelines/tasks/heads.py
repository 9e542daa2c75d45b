"""Small models with every published head, as directories, and what a task says of rows."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from pipelines.batch.worker import Worker
from pipelines.tasks.base import Task
from pipelines.tasks.preparation import documents_of
from tests.helpers import corpus_texts, data_folder, tokenizer_directory

LONGFORMER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 1026,
    "type_vocab_size": 1,
    "attention_window": [32, 64],
    # With the default of 0.02 the attention is uniform and no comparison could see it.
    "initializer_range": 0.3,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
LED: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "attention_window": [32, 64],
    "max_encoder_position_embeddings": 1024,
    "max_decoder_position_embeddings": 1024,
    "init_std": 0.3,
}


def make_head(
    path: Path, name: str, *, labels: Sequence[str] | None = None, seed: int = 5, **config: Any
) -> Any:
    """Write a published class with random weights and the test's vocabulary; return the model."""
    path.mkdir(parents=True, exist_ok=True)
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(tokenizer_directory() / file, path / file)
    tokenizer = transformers.RobertaTokenizerFast.from_pretrained(path)
    family = "LED" if name.startswith("LED") else "Longformer"
    sizes = {"vocab_size": len(tokenizer)} | (LED if family == "LED" else LONGFORMER) | config
    if labels is not None:
        sizes["id2label"] = dict(enumerate(labels))
        sizes["label2id"] = {label: number for number, label in enumerate(labels)}
    torch.manual_seed(seed)
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms are drawn as zeros and ones
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    return model


def tokenizer_of(path: Path) -> Any:
    """The published tokenizer of such a directory; its mask takes the space before it."""
    mask = transformers.AddedToken("<mask>", lstrip=True, special=True)
    return transformers.LongformerTokenizerFast.from_pretrained(path, mask_token=mask)


def answers(task: Task, **columns: Any) -> list[dict[str, Any]]:
    """What a task says of rows, prepared and run as the batch job does, with the counts.

    columns: by role; lists of strings, or of lists of words.
    """
    arrays = {}
    for column in task.inputs:
        kind = pa.large_string() if column.kind == "text" else pa.large_list(pa.large_string())
        arrays[f"__{column.role}"] = pa.array(columns[column.role], kind)
    prepared = task.prepare(pa.table(arrays))
    rows = [i for i, error in enumerate(prepared.column("error").to_pylist()) if error is None]
    documents = documents_of(prepared, [f"row {i}" for i in rows], rows)
    found: list[dict[str, Any]] = [
        {name: row[name] for name in row if not name.startswith("__")}
        for row in prepared.to_pylist()
    ]
    worker = Worker(task, "cpu", 2, 0.2)
    for index, output in worker(documents, lambda: None):
        assert output.error is None, output.error
        found[rows[index]] |= dict(output.columns)
    return found


def corpus(name: str, num_rows: int, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a real corpus; where there is none, rows made of real texts in the same columns."""
    folder = data_folder()
    if folder is not None:
        table = pq.read_table(next(iter(sorted((folder / name).glob("validation-*.parquet")))))
        return table.select(list(columns)).slice(0, num_rows).to_pylist()
    made = {
        "text": lambda text: text,
        "question": lambda text: " ".join(text.split()[40:48]) + "?",
        "choices": lambda text: [" ".join(text.split()[i : i + 6]) for i in (9, 30, 60, 90)],
    }
    texts = corpus_texts(num_rows, 200)
    return [{column: made[column](text) for column in columns} for text in texts]
