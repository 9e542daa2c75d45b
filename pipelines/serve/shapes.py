"""What each task's requests ask of its model, and how outputs are put into Hugging Face's shapes.

A new task needs an entry in `_SHAPES`; routes, limits, errors and usage come by themselves.
"""

import dataclasses
import functools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longformer_core.config import LEDConfig
from longformer_core.errors import LongformerError
from longformer_core.hub import resolve
from pipelines.errors import Refused
from pipelines.serve import api
from pipelines.serve.errors import ApiError
from pipelines.serve.options import Truncate, reads_whole, with_options
from pipelines.serve.service import Answer, with_windows
from pipelines.tasks.answer import Answer as AnswerTask
from pipelines.tasks.base import Task
from pipelines.tasks.fill import Fill, target_ids
from pipelines.tasks.preparation import tokenizer_of
from pipelines.tasks.summarize import Summarize

if TYPE_CHECKING:
    from longformer_core.generation.config import GenerationConfig


@dataclass(frozen=True)
class Ask:
    """What a request comes to: a task with its options, texts by role, and what is made of the
    answers."""

    task: Task
    rows: Sequence[Mapping[str, Any]]
    render: Callable[[list[Answer]], Any]
    timeout_s: float | None = None


@dataclass(frozen=True)
class Shape:
    """A task's route, and the models of both bodies."""

    path: str
    request: type[Any]
    response: Any
    ask: Callable[[Any, Any], Ask]


# --- summarize ---


def ask_summary(task: Task, body: api.SummarizeRequest) -> Ask:
    given = body.parameters or api.SummarizeParameters()
    truncate = body.truncate
    if given.truncation is not None and truncate is None:
        truncate = "error" if given.truncation == "do_not_truncate" else "right"
    decoding = (given.generate_parameters or api.GenerateParameters()).model_dump(exclude_none=True)
    task = summarizer(task, truncate, decoding)
    return Ask(task, [{"text": body.inputs}], _summaries, body.timeout_s)


def ask_quotes(task: Task, body: api.QuoteRequest) -> Ask:
    given = body.parameters or api.QuoteParameters()
    task = with_options(task, num_sentences=given.num_sentences, query=given.query)
    return Ask(task, [{"text": body.inputs}], _summaries, body.timeout_s)


def summarizer(task: Task, truncate: Truncate | None, decoding: dict[str, Any]) -> Task:
    """Return the task with other decoding. Raises: ApiError."""
    if not isinstance(task, Summarize):
        if decoding:
            raise ApiError("invalid", f"{', '.join(decoding)}: an encoder quotes and decodes not")
        if truncate in ("left", "right"):
            raise ApiError("invalid", "truncate: an encoder reads every document whole, in windows")
        return task
    seed = decoding.pop("seed", None)
    try:
        generation = _decoding(task.generation, decoding)
        generation.check(config_of(task.model))
    except LongformerError as error:
        raise ApiError("invalid", str(error)) from None
    if generation.do_sample and seed is None:
        # Drawn here, so that a document that begins again elsewhere says the same.
        seed = secrets.randbits(62)
    task = dataclasses.replace(task, generation=generation)
    return with_options(task, truncate, seed=seed)


@functools.lru_cache(maxsize=4)
def config_of(model: str) -> LEDConfig:
    """Return the config of a model that writes."""
    return LEDConfig.from_pretrained(resolve(model))


def _decoding(base: "GenerationConfig", given: dict[str, Any]) -> "GenerationConfig":
    # What a request says of a length takes the place of what the model says of it by another name.
    if "max_length" in given and "max_new_tokens" not in given:
        given = {"max_new_tokens": None, **given}
    if "min_length" in given and "min_new_tokens" not in given:
        given = {"min_new_tokens": None, **given}
    return base.replace(**given)


def _summaries(answers: list[Answer]) -> list[dict[str, Any]]:
    return [
        {"summary_text": answer.columns["summary"], "usage": answer.usage.model_dump()}
        for answer in answers
    ]


# --- classify ---

# A head of several labels gives these scores, as the batch job does with these problem types.
_SCORES_OF = {
    "softmax": "single_label_classification",
    "sigmoid": "multi_label_classification",
    "none": "regression",
}


def ask_labels(task: Any, body: api.ClassifyRequest) -> Ask:
    given = body.parameters or api.ClassifyParameters()
    if given.function_to_apply is not None:
        if given.function_to_apply == "softmax" and len(task.labels) == 1:
            raise ApiError("invalid", "function_to_apply softmax: the model has a single label")
        task = dataclasses.replace(task, problem_type=_SCORES_OF[given.function_to_apply])
    row: dict[str, Any] = {"text": body.inputs}
    if isinstance(body.inputs, api.TextPair):
        row = {"text": body.inputs.text, "pair": body.inputs.text_pair}
        task = with_options(task, pair_column="pair")

    def render(answers: list[Answer]) -> list[list[dict[str, Any]]]:
        return [list(answer.columns["scores"][: given.top_k]) for answer in answers]

    return Ask(with_options(task, body.truncate), [row], render, body.timeout_s)


# --- tag ---


def ask_entities(task: Any, body: api.TagRequest) -> Ask:
    given = body.parameters or api.TagParameters()
    task = with_options(task, body.truncate, aggregation=given.aggregation_strategy)
    task = with_windows(task, None, given.stride)
    name = "entity" if task.options.aggregation == "none" else "entity_group"

    def render(answers: list[Answer]) -> list[dict[str, Any]]:
        return [
            {
                name: entity["label"],
                "score": entity["score"],
                "word": entity["text"],
                "start": entity["start"],
                "end": entity["end"],
            }
            for answer in answers
            for entity in answer.columns["entities"]
            if entity["label"] not in (given.ignore_labels or ())
        ]

    return Ask(task, [{"text": body.inputs}], render, body.timeout_s)


# --- answer ---


def ask_answer(task: AnswerTask, body: api.AnswerRequest) -> Ask:
    given = body.parameters or api.AnswerParameters()
    task = with_options(
        task,
        body.truncate,
        top_k=given.top_k,
        max_answer_tokens=given.max_answer_len,
        no_answer=given.handle_impossible_answer,
    )
    task = with_windows(task, given.max_seq_len, given.doc_stride)

    def render(answers: list[Answer]) -> Any:
        (answer,) = answers
        if task.options.top_k == 1:
            return _span(answer.columns)
        return [_span(each) for each in answer.columns["answers"]]

    row = {"text": body.inputs.context, "question": body.inputs.question}
    return Ask(task, [row], render, body.timeout_s)


def _span(answer: Mapping[str, Any]) -> dict[str, Any]:
    if answer["answer"] is None:
        return {"answer": "", "score": answer["score"], "start": 0, "end": 0}
    return {name: answer[name] for name in ("answer", "score", "start", "end")}


# --- fill ---


def ask_filling(task: Fill, body: api.FillRequest) -> Ask:
    """One mask gets a list; several get one each, as the published pipeline has it."""
    given = body.parameters or api.FillParameters()
    tokenizer = tokenizer_of(task.model)
    mask = tokenizer.mask_token
    if mask not in body.inputs:
        raise ApiError("no_mask", f"inputs: holds no {mask}; put one in")
    if given.targets is not None:
        try:
            task = dataclasses.replace(task, target_ids=target_ids(tokenizer, given.targets))
        except Refused as error:
            raise ApiError("invalid", str(error)) from None
    task = with_options(task, body.truncate, top_k=given.top_k)

    def render(answers: list[Answer]) -> Any:
        (answer,) = answers
        fills = answer.columns["fills"]
        # Masks that were cut away are not answered.
        is_end = task.options.on_long == "truncate_left"
        first = body.inputs.count(mask) - len(fills) if is_end else 0
        masks = [
            [
                {
                    "score": each["score"],
                    "token": each["token_id"],
                    "token_str": each["token"],
                    "sequence": _filled(body.inputs, mask, place, each["token"]),
                }
                for each in of_mask
            ]
            for place, of_mask in enumerate(fills, first)
        ]
        return masks[0] if len(masks) == 1 else masks

    return Ask(task, [{"text": body.inputs}], render, body.timeout_s)


def _filled(text: str, mask: str, place: int, token: str) -> str:
    """Return the text with one of its masks replaced. A mask takes the space before it."""
    parts = text.split(mask)
    before, after = mask.join(parts[: place + 1]), mask.join(parts[place + 1 :])
    return before.rstrip(" ") + token + after if token.startswith(" ") else before + token + after


# --- embed ---


def ask_embedding(task: Any, body: api.EmbedRequest) -> Ask:
    given: api.EmbedParameters = body.parameters or body
    truncate: Any = given.truncate
    if isinstance(truncate, bool):
        direction = (given.truncation_direction or "right").lower()
        truncate = direction if truncate else "error"
    check_dimensions(task, given.dimensions)
    if given.normalize is not None:
        task = dataclasses.replace(task, normalize=given.normalize)
    inputs = body.inputs
    if isinstance(inputs, api.Sentences):
        texts, render = [inputs.source_sentence, *inputs.sentences], _similarities
    else:
        texts, render = [inputs] if isinstance(inputs, str) else inputs, _vectors
    rows = [{"text": text} for text in texts]
    return Ask(with_options(task, truncate), rows, render, body.timeout_s)


def check_dimensions(task: Any, dimensions: int | None) -> None:
    """Raise ApiError for another length than the model's vectors have."""
    if dimensions not in (None, task.size):
        raise ApiError(
            "invalid", f"dimensions: {dimensions}; the vectors of this model have {task.size}"
        )


def _vectors(answers: list[Answer]) -> list[Any]:
    return [answer.columns["embedding"].tolist() for answer in answers]


def _similarities(answers: list[Answer]) -> list[Any]:
    """Return the cosine of the first with each of the others."""
    vectors = np.array(_vectors(answers))
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found: list[float] = (vectors[1:] @ vectors[0]).tolist()
    return found


# --- choose ---


def ask_choice(task: Task, body: api.ChooseRequest) -> Ask:
    given = body.inputs
    row: dict[str, Any] = {"text": given.prompt, "choices": given.choices}
    if given.question is not None:
        row["question"] = given.question
    column = None if given.question is None else "question"
    options = task.options.model_copy(update={"question_column": column})
    task = with_options(dataclasses.replace(task, options=options), body.truncate)

    def render(answers: list[Answer]) -> list[dict[str, Any]]:
        scores = answers[0].columns["scores"]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        return [{"index": i, "choice": given.choices[i], "score": scores[i]} for i in order]

    return Ask(task, [row], render, body.timeout_s)


_QUOTES = Shape("/summarize", api.QuoteRequest, list[api.Summary], ask_quotes)
_SHAPES = {
    "summarize": Shape("/summarize", api.SummarizeRequest, list[api.Summary], ask_summary),
    "classify": Shape(
        "/text-classification", api.ClassifyRequest, list[list[api.Label]], ask_labels
    ),
    "tag": Shape("/token-classification", api.TagRequest, list[api.Entity], ask_entities),
    "answer": Shape(
        "/question-answering", api.AnswerRequest, api.Answer | list[api.Answer], ask_answer
    ),
    "fill": Shape(
        "/fill-mask",
        api.FillRequest,
        list[api.Filling] | list[list[api.Filling]],
        ask_filling,
    ),
    "embed": Shape(
        "/feature-extraction",
        api.EmbedRequest,
        list[list[float]] | list[float],
        ask_embedding,
    ),
    "choose": Shape("/multiple-choice", api.ChooseRequest, list[api.Choice], ask_choice),
}


def shape_of(task: Task) -> Shape:
    """Return the shape of a task's requests."""
    return _QUOTES if reads_whole(task) else _SHAPES[task.name]
