"""Bodies of requests and responses in Hugging Face's shapes, strict: unknown fields are errors.

Clients send whole numbers as 3 or 3.0, which JSON does not tell apart; nothing else is converted.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)

from pipelines.serve.options import Truncate

# Blank is empty.
Text = Annotated[str, Field(pattern=r"\S")]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _decimal(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _not_set(value: bool) -> bool:
    if value:
        raise ValueError("true has no effect here; leave it out")
    return value


# The conversions stand outside, so that the schema keeps the limits.
Positive = Annotated[Annotated[int, Field(ge=1, le=2**31)], BeforeValidator(_whole)]
NotNegative = Annotated[Annotated[int, Field(ge=0, le=2**31)], BeforeValidator(_whole)]
# Whole numbers that JSON's readers agree on.
Seed = Annotated[Annotated[int, Field(ge=0, le=2**53)], BeforeValidator(_whole)]
Length = Annotated[Annotated[int, Field(ge=2, le=2**31)], BeforeValidator(_whole)]
Few = Annotated[Annotated[int, Field(ge=1, le=1000)], BeforeValidator(_whole)]
One = Annotated[Annotated[int, Field(ge=1, le=1)], BeforeValidator(_whole)]
Zero = Annotated[Annotated[float, Field(ge=0, le=0)], BeforeValidator(_decimal)]
TokenId = Annotated[Annotated[int, Field(ge=0, lt=2**31)], BeforeValidator(_whole)]
# A literal would take 0 for false.
No = Annotated[bool, AfterValidator(_not_set), WithJsonSchema({"type": "boolean", "const": False})]
Beams = Annotated[Annotated[int, Field(ge=1, le=16)], BeforeValidator(_whole)]
Warmth = Annotated[Annotated[float, Field(ge=0, le=2)], BeforeValidator(_decimal)]
# A smaller one divides logits to infinity.
Temperature = Annotated[Annotated[float, Field(ge=0.01, le=100)], BeforeValidator(_decimal)]
Share = Annotated[Annotated[float, Field(gt=0, le=1)], BeforeValidator(_decimal)]
Number = Annotated[
    Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)], BeforeValidator(_decimal)
]
Factor = Annotated[Annotated[float, Field(ge=0.01, le=100)], BeforeValidator(_decimal)]
Seconds = Annotated[Annotated[float, Field(gt=0, le=86400)], BeforeValidator(_decimal)]


class Strict(BaseModel):
    """A body without surprises."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Request(Strict):
    """What every request may say beside its task's own fields."""

    truncate: Truncate | None = Field(
        None,
        description="What becomes of a document that is too long: error, cut at its left or right "
        "end, or read in windows. Default: the server's, error unless it says otherwise.",
    )
    timeout_s: Seconds | None = Field(None, description="Default: the server's, and at most that.")


class Usage(BaseModel):
    """What was read and written: source tokens with special ones, before any cut; coverage is the
    share of the source that the model saw."""

    tokens_in: int
    tokens_out: int | None
    windows: int
    truncated: bool
    coverage: float


# --- summarize ---


class GenerateParameters(Strict):
    """Decoding; what is left out is as the model's generation_config.json says."""

    num_beams: Beams | None = None
    max_new_tokens: Positive | None = None
    max_length: Length | None = None
    min_new_tokens: NotNegative | None = None
    min_length: NotNegative | None = None
    length_penalty: Number | None = None
    repetition_penalty: Factor | None = None
    no_repeat_ngram_size: NotNegative | None = None
    early_stopping: bool | Literal["never"] | None = None
    do_sample: bool | None = None
    temperature: Temperature | None = None
    top_k: NotNegative | None = None
    top_p: Share | None = None
    seed: Seed | None = None


class SummarizeParameters(Strict):
    generate_parameters: GenerateParameters | None = None
    truncation: Literal["do_not_truncate", "longest_first", "only_first"] | None = Field(
        None, description="Hugging Face's name for truncate: the last two are right."
    )
    clean_up_tokenization_spaces: No | None = Field(
        None, description="What the model wrote is not changed."
    )


class SummarizeRequest(Request):
    inputs: Text
    parameters: SummarizeParameters | None = None
    stream: bool = Field(False, description="Server-sent events: tokens as they are certain.")


class QuoteParameters(Strict):
    """Of a summary that an encoder quotes from the document."""

    num_sentences: Positive | None = None
    query: Text | None = Field(None, description="Quote what is nearest to this.")


class QuoteRequest(Strict):
    """An encoder reads every document whole, in windows."""

    inputs: Text
    parameters: QuoteParameters | None = None
    truncate: Literal["error", "window"] | None = None
    timeout_s: Seconds | None = None
    stream: bool = False


class Summary(BaseModel):
    summary_text: str
    usage: Usage


# --- classify ---


class TextPair(Strict):
    text: Text
    text_pair: Text


class ClassifyParameters(Strict):
    top_k: Positive | None = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None


class ClassifyRequest(Request):
    inputs: Text | TextPair
    parameters: ClassifyParameters | None = None


class Label(BaseModel):
    label: str
    score: float


# --- tag ---


class TagParameters(Strict):
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] | None = None
    ignore_labels: list[str] | None = Field(None, description="O is always left out.")
    stride: NotNegative | None = Field(None, description="Tokens that windows share.")


class TagRequest(Request):
    inputs: Text
    parameters: TagParameters | None = None


class Entity(BaseModel):
    entity: str | None = None
    entity_group: str | None = None
    score: float
    word: str
    start: int
    end: int


# --- answer ---


class Question(Strict):
    question: Text
    context: Text


class AnswerParameters(Strict):
    top_k: Few | None = None
    max_answer_len: Positive | None = None
    max_seq_len: Positive | None = Field(None, description="Tokens of a window.")
    doc_stride: NotNegative | None = Field(None, description="Tokens that windows share.")
    handle_impossible_answer: bool | None = None


class AnswerRequest(Request):
    inputs: Question
    parameters: AnswerParameters | None = None


class Answer(BaseModel):
    """An answer; none is an empty text at 0, where impossible answers are handled."""

    answer: str
    score: float
    start: int
    end: int


# --- fill ---


class FillParameters(Strict):
    top_k: Few | None = None
    targets: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None


class FillRequest(Request):
    inputs: Text
    parameters: FillParameters | None = None


class Filling(BaseModel):
    score: float
    token: int
    token_str: str
    sequence: str


# --- embed ---


class Sentences(Strict):
    source_sentence: Text
    sentences: Annotated[list[Text], Field(min_length=1)]


class EmbedParameters(Strict):
    normalize: bool | None = None
    truncate: bool | Truncate | None = Field(None, description="true cuts; see `Request`.")
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None
    dimensions: Positive | None = None
    encoding_format: Literal["float"] | None = None


class EmbedRequest(EmbedParameters):
    """Feature extraction, or a sentence and others for their similarity.

    Hugging Face's clients put the parameters at the top for the one, under a name for the other.
    """

    inputs: Text | Annotated[list[Text], Field(min_length=1)] | Sentences
    parameters: EmbedParameters | None = None
    timeout_s: Seconds | None = None


# --- choose ---


class Choices(Strict):
    prompt: Text
    choices: Annotated[list[Text], Field(min_length=1)]
    question: Text | None = None


class ChooseRequest(Request):
    inputs: Choices


class Choice(BaseModel):
    index: int
    choice: str
    score: float


# --- beside tasks ---


class TokenizeRequest(Strict):
    inputs: Annotated[str, Field()]


class Tokenized(BaseModel):
    ids: list[int]
    count: int


class Info(BaseModel):
    """What is served, and within which limits. generates: it writes, and takes decoding options."""

    model: str
    task: str
    generates: bool
    dtype: str
    version: str
    labels: list[str] | None
    max_source_tokens: int
    window_tokens: int
    stride_tokens: int
    truncate: Truncate
    max_body_bytes: int
    max_items: int
    timeout_s: float
    max_queued_tokens: int


class Health(BaseModel):
    status: Literal["live", "ready"]


class ErrorBody(BaseModel):
    message: str
    type: str
    code: int
    request_id: str
    retry_after_s: float | None = None


class Error(BaseModel):
    error: ErrorBody
