"""What a server is asked for; YAML, flags and the arguments of a Serve application enter here."""

import dataclasses
import socket
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from longformer_core.errors import LongformerError, did_you_mean
from longformer_core.hub import resolve
from pipelines.errors import Refused
from pipelines.tasks import task_class
from pipelines.tasks.base import Count, Task, split_names
from pipelines.tasks.encoding import task_of

T = TypeVar("T", bound=Task)
Truncate = Literal["error", "left", "right", "window"]
Positive = Annotated[float, Field(gt=0)]
# A pack that is encoded is one step, in which nobody can be cancelled: smaller than in a batch job.
_BATCH_TOKENS_ON_CPU = 4096
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ON_LONG = {"error": "error", "left": "truncate_left", "right": "truncate", "window": "windows"}


class ServeOptions(BaseModel):
    """The model, the limits of its API, and how it is spread over a cluster.

    Unknown names are errors. The description of a field is its help on the command line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="A published model directory, its URL, or a hub id.")
    task: Literal["summarize", "answer", "classify", "tag", "choose", "fill", "embed"] | None = (
        Field(None, description="Default: what the model's class is made for.")
    )
    name: str | None = Field(
        None, description="The model's name in the API. Default: that of its directory."
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on CPUs, bfloat16 on GPUs."
    )
    max_source_tokens: Annotated[int, Field(ge=3)] | None = Field(
        None, description="Special tokens included. Default: the model's positions."
    )
    window_tokens: Annotated[int, Field(ge=3)] | None = Field(
        None, description="Tokens of a window. Default: --max-source-tokens."
    )
    stride_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Tokens that a window shares with the one before."
    )
    batch_tokens: Count | None = Field(
        None, description="Source tokens encoded at once. Default: 4096 on CPUs."
    )
    task_option: tuple[str, ...] = Field(
        (),
        description="An option of the task, as in its batch command: num_beams=4.",
        json_schema_extra={"metavar": "NAME=VALUE"},
    )
    truncate: Truncate = Field(
        "error", description="Of over-long documents where a request does not say it."
    )
    max_body_bytes: Count = Field(8 * 2**20, description="Of a request.")
    max_items: Count = Field(32, description="Texts of one request.")
    max_requests: Count = Field(512, description="That a gateway answers at once.")
    max_queued_tokens: Count | None = Field(
        None,
        description="Of documents that a model replica holds; more get 429. Default: 16 of the "
        "longest.",
    )
    timeout_s: Positive = Field(300.0, description="A request's deadline, unless it sets less.")
    body_timeout_s: Positive = Field(30.0, description="For the body of a request to arrive.")
    keys_file: str | None = Field(
        None, description="Keys that open the API, a line each: sha256 in hex, then a name."
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        description="Pages of other origins that may call the API. Default: none.",
        json_schema_extra={"comma_separated": True},
    )
    num_gateways: Count = Field(2, description="Processes that check, tokenize and stream.")
    min_replicas: Annotated[int, Field(ge=0)] = Field(
        1, description="Of the model; 0 lets it go when nobody asks."
    )
    max_replicas: Count | None = Field(
        None, description="Of the model. Default: --min-replicas, at least 1."
    )
    target_wait_s: Positive = Field(
        10.0, description="More replicas are started when documents would wait longer."
    )
    threads: Count | None = Field(
        None, description="CPUs of a model replica. Default: 1; one machine: its cores."
    )

    _split = field_validator("cors_origins", mode="before")(split_names)

    @property
    def most_replicas(self) -> int:
        """Model replicas, at most."""
        return self.max_replicas or max(1, self.min_replicas)

    @property
    def public_name(self) -> str:
        """The model's name in the API."""
        return self.name or Path(self.model.rstrip("/")).name

    def queued_tokens(self, max_source_tokens: int) -> int:
        """Return how many tokens may be queued on one model replica."""
        return self.max_queued_tokens or 16 * max_source_tokens


def check_open(options: ServeOptions, host: str, *, insecure: bool) -> None:
    """Raise Refused where others could reach an API that asks for no key."""
    if host not in _LOOPBACK and not options.keys_file and not insecure:
        raise Refused(
            f"--host {host}: others can reach it, and there are no keys; give --keys-file, or "
            "--insecure if something before it asks for keys"
        )


def check_free(host: str, port: int) -> None:
    """Raise Refused where something listens already, or the host is none of this machine's."""
    try:
        with socket.create_server((host, port), family=_family_of(host)):
            pass
    except OSError as error:
        raise Refused(f"--host {host} --port {port}: {error.strerror}; choose another") from error


def _family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def make_task(options: ServeOptions) -> Task:
    """Return the task of a server's model, as the batch job has it.

    Raises: Refused with everything that is wrong.
    """
    problems = []
    if options.device == "auto":
        problems.append("--device auto: say cpu or cuda")
    if options.max_replicas is not None and options.max_replicas < options.min_replicas:
        problems.append(f"--max-replicas {options.max_replicas}: below --min-replicas")
    try:
        name = options.task or task_of(resolve(options.model))
    except LongformerError as error:
        raise Refused([*problems, f"--model: {error}"]) from error
    if name is None:
        raise Refused([*problems, "--task: the model's directory does not say what it is for"])
    kind = task_class(name)
    given: dict[str, Any] = options.model_dump(
        include={
            "model", "dtype", "max_source_tokens", "window_tokens", "stride_tokens", "batch_tokens"
        }
    )  # fmt: skip
    if given["batch_tokens"] is None and options.device == "cpu":
        given["batch_tokens"] = _BATCH_TOKENS_ON_CPU
    for pair in options.task_option:
        key, equals, value = pair.partition("=")
        if not equals or key in given or key not in kind.options_class.model_fields:
            hint = did_you_mean(key, kind.options_class.model_fields)
            problems.append(f"--task-option {pair!r}: {name} has no such option{hint}")
        given[key] = value
    if problems:
        raise Refused(problems)
    try:
        # Windows are allowed, so that the sizes of windows are; the policy is told below.
        chosen = kind.options_class(**given, on_long="windows")
    except ValidationError as error:
        raise Refused(
            [f"--task-option {each['loc'][0]}: {each['msg']}" for each in error.errors()]
        ) from None
    task = kind.from_options(chosen, device=options.device)
    return task if reads_whole(task) else with_options(task, options.truncate)


def with_options(task: T, truncate: Truncate | None = None, **options: Any) -> T:
    """Return a task with other options; those that are None stay as they are."""
    given = {name: value for name, value in options.items() if value is not None}
    if truncate is not None:
        given["on_long"] = _ON_LONG[truncate]
    return dataclasses.replace(task, options=task.options.model_copy(update=given))


def reads_whole(task: Task) -> bool:
    """Return whether a task reads every document in windows, whatever one asks."""
    from pipelines.tasks.extract import ExtractiveSummarize

    return isinstance(task, ExtractiveSummarize)
