"""The contract of a task, shared by batch inference, training and serving.

A task turns the text of a document into columns, in three steps that every graph runs where it
likes:

    prepare   texts -> windows of token ids           CPU, Arrow in and out, no torch
    process   windows -> requests for an engine,      in the process that holds the model
              their results -> the task's columns
    engine    requests -> results                     generation or encoding, of `longformer_core`

Importing a task loads neither torch nor a graph.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict, Field, field_validator

from longformer_core.errors import LongformerError
from longformer_core.hub import resolve
from pipelines.errors import Refused
from pipelines.rows import OUTPUT_VERSION, InputColumn
from pipelines.storage import Location, locate
from pipelines.tasks.preparation import Frame, Window

if TYPE_CHECKING:
    from longformer_core.metrics import Scores

_LIBRARY_BYTES = 512 * 2**20
Count = Annotated[int, Field(ge=1)]


def split_names(value: Any) -> tuple[str, ...]:
    """Take `a,b` for two names, alone or among others."""
    given = [value] if isinstance(value, str) else value
    return tuple(name.strip() for each in given for name in str(each).split(",") if name.strip())


class TaskOptions(BaseModel):
    """What every task can be asked; YAML, flags and the arguments of an endpoint enter here.

    Unknown names are errors. The description of a field is its help on the command line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="A published model directory, its URL, or a hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on CPUs, bfloat16 on GPUs."
    )
    text_column: str = Field("text", description="The column that holds the document.")
    text_columns: tuple[str, ...] = Field(
        (),
        description="Several columns that make the document together, in this order.",
        json_schema_extra={"comma_separated": True},
    )
    separator: str = Field("\n\n", description="What stands between them. Default: a blank line.")
    instruction: str = Field("", description="A text put before every document.")
    max_source_tokens: Annotated[int, Field(ge=3)] | None = Field(
        None, description="Special tokens included. Default: the model's positions."
    )
    on_long: Literal["truncate", "truncate_left", "error", "windows"] = Field(
        "truncate",
        description="What to do with longer documents. truncate keeps the beginning, "
        "truncate_left the end.",
    )
    window_tokens: Annotated[int, Field(ge=3)] | None = Field(
        None, description="Tokens of a window. Default: --max-source-tokens."
    )
    stride_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Tokens that a window shares with the one before."
    )
    batch_tokens: Count | None = Field(
        None, description="Source tokens encoded at once. Default: what suits the device."
    )

    _split = field_validator("text_columns", mode="before")(split_names)


# What of the options cannot change a row, or is told elsewhere in a fingerprint.
_NOT_IN_FINGERPRINT = {
    "model", "dtype", "batch_tokens", "text_column", "text_columns", "separator", "instruction",
    "window_tokens", "stride_tokens", "max_source_tokens",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One row on its way through a model: its windows, and what its answer is cut out of.

    offsets: [num_tokens, 2] characters of `text`, begin and end of each of the document's own
        tokens; None where the task needs none.
    """

    id: str
    windows: Sequence[Window]
    text: str | None = None
    offsets: np.ndarray | None = None


@dataclass(frozen=True)
class Output:
    """A model's answer for one document: the task's columns, or the error that took their place."""

    columns: Mapping[str, Any]
    num_tokens_out: int | None = None
    error: Exception | None = None


# Requests of a document go out, their results come in, in their order; at last its output. A result
# with an error ends the process: the error is the document's.
Process = Generator[list[Any], list[Any], Output]


def advance(process: Process, results: list[Any] | None) -> Output | list[Any]:
    """Return what a document asks next, or its output; an error of any window is the document's.

    results: of what it asked before; None at first.
    """
    failed = next((each.error for each in results or () if each.error is not None), None)
    if failed is not None:
        process.close()
        return Output({}, error=failed)
    try:
        return process.send(results)  # type: ignore[arg-type]
    except StopIteration as end:
        output: Output = end.value
        return output


@dataclass(frozen=True)
class Task(ABC):
    """What turns documents into columns. Picklable; made by `from_options`.

    Example:
        >>> task = Summarize.from_options(SummarizeOptions(model="led"), device="cpu")
        >>> run_batch(task, list_corpus(["reports/"], inputs=task.inputs), "run")

    dtype: the resolved one.
    max_source_tokens, window_tokens, stride_tokens: the resolved limits, special tokens included.
    """

    options: TaskOptions
    model: str
    dtype: str
    max_source_tokens: int
    window_tokens: int
    stride_tokens: int

    name: ClassVar[str]
    options_class: ClassVar[type[TaskOptions]] = TaskOptions
    # Whether `process` reads the text, and where in it the tokens lie.
    needs_text: ClassVar[bool] = False
    # What a window shares with the one before unless told, as a share of a window.
    default_stride: ClassVar[float] = 0.0

    @classmethod
    def from_options(cls, options: TaskOptions, *, device: str) -> Self:
        """Check the options against the model directory and resolve what they leave open.

        device: "cpu" or "cuda", which decides the dtype of "auto".
        Raises: Refused with everything that is wrong.
        """
        try:
            directory = resolve(options.model)
        except LongformerError as error:
            raise Refused(f"--model: {error}") from error
        problems = cls.check_directory(directory)
        if problems:
            raise Refused([f"--model: {problem}" for problem in problems])
        positions = cls.num_positions(directory)
        limit = options.max_source_tokens or positions
        window = options.window_tokens or limit
        stride = options.stride_tokens
        if stride is None:
            stride = int(cls.default_stride * window)
        for name, value in (("--max-source-tokens", limit), ("--window-tokens", window)):
            if value > positions:
                problems.append(f"{name} {value}: the model has {positions} positions")
        if stride > window - 3:
            problems.append(
                f"--stride-tokens {stride}: a window of {window} tokens must share less than that "
                "with the one before"
            )
        if options.on_long != "windows" and (options.window_tokens or options.stride_tokens):
            problems.append("--window-tokens and --stride-tokens need --on-long windows")
        dtype = options.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        # Workers read the directory from wherever they run.
        is_path = Path(options.model).expanduser().is_dir()
        settings: dict[str, Any] = {
            "options": options,
            "model": str(directory.absolute()) if is_path else options.model,
            "dtype": dtype,
            "max_source_tokens": limit,
            "window_tokens": window,
            "stride_tokens": stride,
        }
        try:
            settings |= cls._resolve(options, directory)
        except (Refused, LongformerError) as error:
            problems += error.problems if isinstance(error, Refused) else [str(error)]
        if problems:
            raise Refused(problems)
        return cls(**settings)

    @classmethod
    def _resolve(cls, options: Any, directory: Path) -> dict[str, Any]:  # noqa: ARG003
        """Return the values of a task's own fields."""
        return {}

    @classmethod
    @abstractmethod
    def check_directory(cls, directory: Path) -> list[str]:
        """Return why a directory does not fit the task, and what would; empty when it fits."""

    @classmethod
    @abstractmethod
    def num_positions(cls, directory: Path) -> int:
        """Return the most tokens that the model reads at once."""

    @classmethod
    def inputs_of(cls, options: Any) -> tuple[InputColumn, ...]:
        """Return the columns that a task with these options reads; the document first."""
        return (text_input(options),)

    @property
    def inputs(self) -> tuple[InputColumn, ...]:
        """The columns that are read."""
        return self.inputs_of(self.options)

    @property
    @abstractmethod
    def columns(self) -> pa.Schema:
        """The columns that are written."""

    def prepare(self, block: pa.Table) -> pa.Table:
        """Return the windows of every document of a block, or why it has none.

        block: the columns of `inputs`, named `__ROLE`. Returns the columns of `PREPARED`.
        """
        from pipelines.tasks.preparation import prepare

        return prepare(self, block)

    def frames(self, block: pa.Table) -> list[list[Frame]]:
        """Return what stands around the tokens of each row's document in each window.

        block: as for `prepare`, with usable rows alone.
        """
        from pipelines.tasks.preparation import single_frame, tokenizer_of

        frame = single_frame(tokenizer_of(self.model), is_first_global=True)
        return [[frame]] * block.num_rows

    def extra_windows(self, block: pa.Table) -> list[list[Window]]:
        """Return windows of each row that hold none of its document, behind those that do."""
        return [[] for _ in range(block.num_rows)]

    @abstractmethod
    def load_engine(self, device: str, memory_share: float) -> Any:
        """Load the model into an engine, in a process of its own.

        memory_share: what documents may take of the memory that is free then.
        """

    @abstractmethod
    def process(self, document: Document) -> Process:
        """Ask an engine about a document and merge the results of its windows."""

    # --- how good its rows are ---

    def predictions(self, rows: pa.Table) -> list[Any]:
        """Return what of each row is compared with its reference; None for a failed row.

        rows: every row that a run wrote. By default the task's first column.
        """
        found: list[Any] = rows.column(self.columns.names[0]).to_pylist()
        return found

    def references(self, rows: pa.Table, given: Sequence[Any]) -> list[Any]:  # noqa: ARG002
        """Return what predictions are compared with, of what stands in a column of references.

        given: one a row, never None; each task says at `score` what they are.
        Raises: Refused for values that are no references.
        """
        return list(given)

    @abstractmethod
    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> "Scores":
        """Return how well predictions agree with references, in the field's metrics."""

    # --- what a run records and plans with ---

    def fingerprint(self) -> dict[str, Any]:
        """Return all of the task that can change a row. `batch_tokens` cannot, beyond rounding."""
        return {
            "task": self.name,
            "output_version": OUTPUT_VERSION,
            "model": {path.name: _hash(path) for path in self._model_files()},
            "options": self._fingerprint_options(),
            "dtype": self.dtype,
        }

    def _fingerprint_options(self) -> dict[str, Any]:
        chosen = self.options.model_dump(mode="json", exclude=_NOT_IN_FINGERPRINT)
        chosen["max_source_tokens"] = self.max_source_tokens
        if self.options.on_long == "windows":
            chosen |= {"window_tokens": self.window_tokens, "stride_tokens": self.stride_tokens}
        return chosen

    def _model_files(self) -> list[Path]:
        from longformer_core.checkpoints.directory import list_model_files

        return list_model_files(resolve(self.model))

    def locations(self) -> list[Location]:
        """Return the local paths that every node must see."""
        return [locate(self.model)] if Path(self.model).is_dir() else []

    def worker_memory_bytes(self) -> int:
        """Return what a worker needs: the weights, twice while they load, and the libraries."""
        return 2 * sum(path.stat().st_size for path in self._model_files()) + _LIBRARY_BYTES

    def output_row_bytes(self) -> int:
        """Return a generous guess at a row on disk."""
        return 1000

    def describe(self) -> dict[str, str]:
        """Return what a plan says of the task, by subject."""
        limit = f"at most {self.max_source_tokens} tokens, longer: {self.options.on_long}"
        if self.options.on_long == "windows":
            limit = f"windows of {self.window_tokens} tokens that share {self.stride_tokens}"
        return {"model": f"{self.model} in {self.dtype}", "source": limit}


def text_input(options: TaskOptions) -> InputColumn:
    """Return the column, or the columns, of the document itself."""
    columns = options.text_columns or (options.text_column,)
    return InputColumn("text", columns, separator=options.separator, prefix=options.instruction)


def _hash(path: Path) -> str:
    digest = xxhash.xxh64()
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    return str(digest.hexdigest())
