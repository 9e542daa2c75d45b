"""Summarization with LED: a text becomes token ids, generated ids become the column `summary`.

torch is imported by the worker alone: a process that only tokenizes starts without it.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from longformer_core.generation.config import GenerationConfig
from longformer_core.hub import resolve
from longformer_core.tokenization.tokenizer import LEDTokenizerFast
from pipelines.rows import OUTPUT_VERSION, row_error
from pipelines.storage import Location, locate
from pipelines.tasks.base import Encoded, Output

COLUMNS = pa.schema([pa.field("summary", pa.large_string())])

_LIBRARY_BYTES = 512 * 2**20

if TYPE_CHECKING:
    from longformer_core.generation.request import Request

RowError = dict[str, str] | None


@dataclass(frozen=True, kw_only=True)
class Summarize:
    """Everything that decides what a summary says. Picklable: workers load the model themselves.

    Units: `max_source_tokens` counts `<s>` and `</s>`; `batch_tokens` counts source tokens encoded
    at once, None takes what suits the device.
    """

    model: str
    generation: GenerationConfig
    max_source_tokens: int
    on_long: Literal["truncate", "error"] = "truncate"
    dtype: str = "float32"
    batch_tokens: int | None = None
    seed: int = 0

    name = "summarize"
    columns = COLUMNS

    def load_encoder(self) -> "SummarizeEncoder":
        return SummarizeEncoder(self)

    def load_worker(self, device: str, num_threads: int, memory_share: float) -> "SummarizeWorker":
        return SummarizeWorker(self, device, num_threads, memory_share)

    def fingerprint(self) -> dict[str, Any]:
        """What of the task can change a row. `batch_tokens` cannot, beyond rounding."""
        options = self.generation.to_dict() | {
            "max_source_tokens": self.max_source_tokens,
            "on_long": self.on_long,
        }
        if self.generation.do_sample:
            options["seed"] = self.seed
        return {
            "task": self.name,
            "output_version": OUTPUT_VERSION,
            "model": {path.name: _hash(path) for path in self._model_files()},
            "options": options,
            "dtype": self.dtype,
        }

    def _model_files(self) -> list[Path]:
        from longformer_core.checkpoints.directory import list_model_files

        return list_model_files(resolve(self.model))

    def locations(self) -> list[Location]:
        """Local paths that every node must see."""
        return [locate(self.model)] if os.path.isdir(self.model) else []

    def worker_memory_bytes(self) -> int:
        """What a worker needs: the weights, twice while they load, and the libraries."""
        weights = sum(path.stat().st_size for path in self._model_files())
        return 2 * weights + _LIBRARY_BYTES

    def output_row_bytes(self) -> int:
        """A generous guess at a row on disk: six bytes a token, and the counts."""
        return 6 * self.generation.total_length + 200


def _hash(path: Any) -> str:
    digest = xxhash.xxh64()
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    return str(digest.hexdigest())


class SummarizeEncoder:
    """Texts -> token ids, cut to `max_source_tokens` with the final `</s>` kept."""

    def __init__(self, task: Summarize) -> None:
        self.limit, self.on_long = task.max_source_tokens, task.on_long
        self.tokenizer = LEDTokenizerFast.from_pretrained(resolve(task.model))

    def __call__(self, texts: pa.ChunkedArray) -> Encoded:
        texts = texts.combine_chunks()
        errors = _unreadable(texts)
        errors = [
            e or other for e, other in zip(errors, _unusable(_without(texts, errors)), strict=True)
        ]
        ids = self.tokenizer.encode_arrow(_without(texts, errors))
        lengths = pc.list_value_length(ids).to_pylist()
        for row, length in enumerate(lengths):
            if length is not None and length > self.limit and self.on_long == "error":
                limit = f"{length} tokens, max_source_tokens is {self.limit}"
                errors[row] = row_error(
                    "tokenize", "TooLong", f"{limit}; cut it or raise the limit"
                )
        return self._cut(ids, lengths, errors)

    def _cut(
        self, ids: pa.LargeListArray, lengths: list[int | None], errors: list[RowError]
    ) -> Encoded:
        values, offsets = ids.values.to_numpy(), ids.offsets.to_numpy()
        parts = [np.zeros(0, np.int32)]
        ends, coverage = [0], []
        for row, (length, error) in enumerate(zip(lengths, errors, strict=True)):
            kept = 0
            if length is not None and error is None:
                kept = min(length, self.limit)
                start = int(offsets[row])
                parts += [
                    values[start : start + kept - 1],
                    values[start + length - 1 : start + length],
                ]
            ends.append(ends[-1] + kept)
            coverage.append(_coverage(length, kept) if length is not None and kept else None)
        good = [c is not None for c in coverage]
        return Encoded(
            input_ids=pa.LargeListArray.from_arrays(
                pa.array(ends, pa.int64()),
                pa.array(np.concatenate(parts), pa.int32()),
                mask=pa.array([not g for g in good], pa.bool_()),
            ),
            num_tokens_in=pa.array(lengths, pa.int32()),
            num_windows=pa.array([1 if g else None for g in good], pa.int32()),
            truncated=pa.array([c < 1.0 if c is not None else None for c in coverage], pa.bool_()),
            coverage=pa.array(coverage, pa.float64()),
            errors=errors,
        )


def _unreadable(texts: pa.Array) -> list[RowError]:
    """The error of every row whose bytes are not UTF-8: Arrow hands them on without a look."""
    errors: list[RowError] = [None] * len(texts)
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        for row in range(len(texts)):
            try:
                texts.slice(row, 1).validate(full=True)
            except pa.ArrowInvalid:
                errors[row] = row_error("read", "ReadError", "the text is not valid UTF-8")
    return errors


def _without(texts: pa.Array, errors: list[RowError]) -> pa.Array:
    """The texts, null where there is an error."""
    return pc.if_else(pa.array([e is None for e in errors], pa.bool_()), texts, None)


def _unusable(texts: pa.Array) -> list[RowError]:
    """The error of every row without text. Control characters are text; blanks are not."""
    blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(texts)), 0).to_pylist()
    errors: list[RowError] = []
    for is_blank in blank:
        if is_blank is None:
            errors.append(row_error("read", "NullText", "the text is null"))
        elif is_blank:
            errors.append(row_error("read", "EmptyText", "the text is empty or blank"))
        else:
            errors.append(None)
    return errors


def _coverage(length: int, kept: int) -> float:
    """Source tokens seen / source tokens, without the two special ones."""
    return 1.0 if length <= 2 else (kept - 2) / (length - 2)


class SummarizeWorker:
    """A loaded LED behind one engine, which decodes the documents of all callers together."""

    def __init__(self, task: Summarize, device: str, num_threads: int, memory_share: float) -> None:
        import torch

        from longformer_core.generation.engine import Engine
        from longformer_core.models.led import LEDForConditionalGeneration
        from longformer_core.scheduling.memory import available_bytes

        if device == "cpu":
            # Ray sets OMP_NUM_THREADS from the logical CPUs it was asked for, which say nothing
            # about how many cores this worker has to itself.
            torch.set_num_threads(num_threads)
        directory = resolve(task.model)
        self.task = task
        self.tokenizer = LEDTokenizerFast.from_pretrained(directory)
        self.model = LEDForConditionalGeneration.from_pretrained(
            directory, dtype=getattr(torch, task.dtype), device=device
        )
        self.engine = Engine(
            self.model,
            batch_tokens=task.batch_tokens,
            memory_bytes=int(memory_share * available_bytes(self.model.device)),
        )
        options = task.generation
        special = {options.decoder_start_token_id, options.bos_token_id, options.pad_token_id}
        self.special = (special | set(options.eos_token_ids)) - {None}

    def __call__(
        self, documents: Sequence[tuple[str, Sequence[int]]], on_progress: Callable[[], None]
    ) -> Iterator[tuple[int, Output]]:
        requests = [self._request(name, ids) for name, ids in documents]
        for index, generation in self.engine.run(requests, on_progress):
            if generation.error is not None:
                yield index, Output({}, error=generation.error)
                continue
            ids = generation.sequences[0]
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            yield index, Output({"summary": text}, sum(i not in self.special for i in ids))

    def _request(self, name: str, ids: Sequence[int]) -> "Request":
        from longformer_core.generation.request import Request

        options = self.task.generation
        seed = row_seed(self.task.seed, name) if options.do_sample else None
        return Request(ids, options, seed=seed)


def row_seed(seed: int, name: str) -> int:
    """A row's own seed: the same in every run, whatever rows are beside it. 63 bits."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
