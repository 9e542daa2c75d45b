"""What a server is asked for; YAML, flags and the arguments of a Serve application enter here."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipelines.tasks.base import Count, split_names

Positive = Annotated[float, Field(gt=0)]


class ServeOptions(BaseModel):
    """Limits of the API, and how it is spread over a cluster. Unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["summarize", "answer", "classify", "tag", "choose", "fill", "embed"] | None = (
        Field(None, description="Default: what the model's class is made for.")
    )
    name: str | None = Field(
        None, description="The model's name in the API. Default: that of its directory."
    )
    truncate: Literal["error", "left", "right", "window"] = Field(
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

    _split = field_validator("cors_origins", mode="before")(split_names)

    def queued_tokens(self, max_source_tokens: int) -> int:
        """Return how many tokens may be queued on one model replica."""
        return self.max_queued_tokens or 16 * max_source_tokens

    def strict(self) -> dict[str, Any]:
        """Return what was chosen, as plain values."""
        return self.model_dump(mode="json", exclude_defaults=True)
