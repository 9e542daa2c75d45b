"""Entities of a document: spans of its text with a label each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines.errors import Refused
from pipelines.rows import InputColumn
from pipelines.tasks.base import Document, Output, Process, text_input
from pipelines.tasks.encoding import EncodingOptions, EncodingTask, softmax, token_values
from pipelines.tasks.preparation import Frame, single_frame, tokenizer_of

Aggregation = Literal["none", "simple", "first", "average", "max"]
# What no entity is made of.
_OUTSIDE = "O"

if TYPE_CHECKING:
    from longformer_core.metrics import Scores


class TagOptions(EncodingOptions):
    words_column: str | None = Field(
        None, description="A column of lists of words instead of a text; spaces join them."
    )
    aggregation: Aggregation = Field(
        "simple",
        description="none: an entity a token. simple: tokens of one label joined. first, average, "
        "max: the same after each word has one label, that of its first or likeliest token or of "
        "the mean.",
    )


@dataclass(frozen=True)
class Tag(EncodingTask):
    """Entities with their characters. Each token's label is from the window with most context.

    Source: the aggregation strategies of transformers' token-classification pipeline.
    """

    options: TagOptions

    name = "tag"
    options_class = TagOptions
    models: ClassVar = {"longformer": "LongformerForTokenClassification"}
    needs_text = True
    default_stride = 0.25

    @classmethod
    def inputs_of(cls, options: Any) -> tuple[InputColumn, ...]:
        if options.words_column:
            return (InputColumn("text", (options.words_column,), "words"),)
        return (text_input(options),)

    @property
    def columns(self) -> pa.Schema:
        entity = pa.struct(
            [
                pa.field("label", pa.string()),
                pa.field("score", pa.float64()),
                pa.field("start", pa.int64()),
                pa.field("end", pa.int64()),
                pa.field("text", pa.large_string()),
            ]
        )
        return pa.schema([pa.field("entities", pa.list_(entity))])

    def frames(self, block: pa.Table) -> list[list[Frame]]:
        is_global = self.options.global_attention == "first"
        return [
            [single_frame(tokenizer_of(self.model), is_first_global=is_global)]
        ] * block.num_rows

    def process(self, document: Document) -> Process:
        results = yield [self.request(window) for window in document.windows]
        assert document.text is not None
        assert document.offsets is not None
        logits = [result.logits.numpy() for result in results]
        scores = softmax(token_values(document, logits, len(document.offsets)))
        # A document that was cut has tokens that no window holds.
        seen = slice(document.windows[0].start, max(w.start + w.size for w in document.windows))
        pieces = [
            _Piece(int(begin), int(end), each)
            for (begin, end), each in zip(document.offsets[seen], scores[seen], strict=True)
        ]
        if self.options.aggregation not in ("none", "simple"):
            goes_on = self._continues(document, document.text)
            words = _words(pieces, goes_on[seen])
            pieces = [_joined(word, self.options.aggregation) for word in words]
        entities = [self._entity(group, document.text) for group in self._groups(pieces)]
        return Output({"entities": [each for each in entities if each["label"] != _OUTSIDE]})

    def _continues(self, document: Document, text: str) -> list[bool]:
        """Return for each token whether it belongs to the word of the one before.

        WordPiece says so itself; of other tokens one does that has no space before it.
        """
        tokenizer = tokenizer_of(self.model)
        assert document.offsets is not None
        ids = token_values(document, [w.input_ids for w in document.windows], len(document.offsets))
        tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
        prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
        found = []
        for token, number, (start, end) in zip(tokens, ids, document.offsets, strict=True):
            if number == tokenizer.unk_token_id:
                found.append(False)
            elif prefix:
                found.append(len(token) != end - start)
            else:
                found.append(bool(start) and " " not in text[start - 1 : start + 1])
        return found

    def _groups(self, pieces: list["_Piece"]) -> Iterator[list["_Piece"]]:
        """Yield neighbours that are one entity: of one kind, up to the next one marked `B-`."""
        group: list[_Piece] = []
        for piece in pieces:
            label = self.labels[piece.label]
            may_join = bool(group) and self.options.aggregation != "none"
            if may_join and not label.startswith("B-") and _kind(label) == self._kind_of(group):
                group.append(piece)
                continue
            if group:
                yield group
            group = [piece]
        if group:
            yield group

    def _kind_of(self, group: list["_Piece"]) -> str:
        return _kind(self.labels[group[-1].label])

    def _entity(self, group: list["_Piece"], text: str) -> dict[str, Any]:
        label = self.labels[group[0].label]
        if self.options.aggregation != "none":
            label = label.split("-", 1)[-1]
        start, end = group[0].start, group[-1].end
        score = float(np.mean([piece.score for piece in group]))
        return {"label": label, "score": score, "start": start, "end": end, "text": text[start:end]}

    def references(self, rows: pa.Table, given: Sequence[Any]) -> list[Any]:
        if not any(isinstance(each, str) for row in given for each in row):
            return [[(e["label"], e["start"], e["end"]) for e in row] for row in given]
        name = self.options.words_column
        if name not in rows.column_names:
            raise Refused(
                f"the reference holds tags of words; their characters are known only if the "
                f"run reads a column of words (--words-column) and keeps it (--keep-columns "
                f"{name or 'NAME'})"
            )
        found = []
        for row, words, tags in zip(
            rows.column("id").to_pylist(), rows.column(name).to_pylist(), given, strict=True
        ):
            if words is not None and len(words) != len(tags):
                raise Refused(f"row {row!r} has {len(words)} words and {len(tags)} tags")
            # A row without its words has failed: its entities count, wherever they are.
            found.append(_spans([word or "" for word in words or tags], tags))
        return found

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> "Scores":
        """Precision, recall and F1 of exact entities.

        A reference is a list of structs (label, start, end) in characters, or of BIO tags, one a
        word; then the run must have kept the column of the words.
        """
        from longformer_core.metrics import score_spans

        found = [
            None if row is None else [(e["label"], e["start"], e["end"]) for e in row]
            for row in predictions
        ]
        return score_spans(found, references)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A token, or a word, and the probability of every label."""

    start: int
    end: int
    scores: np.ndarray

    @property
    def label(self) -> int:
        return int(self.scores.argmax())

    @property
    def score(self) -> float:
        return float(self.scores.max())


def _spans(words: Sequence[str], tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the entities of tagged words, in characters of the words joined by spaces."""
    from longformer_core.metrics import spans_of_tags

    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    return [
        (label, int(starts[first]), int(starts[end]) - 1)
        for label, first, end in spans_of_tags(tags)
    ]


def _words(pieces: list[_Piece], goes_on: list[bool]) -> Iterator[list[_Piece]]:
    """Yield the tokens of each word."""
    word: list[_Piece] = []
    for piece, continues in zip(pieces, goes_on, strict=True):
        if word and not continues:
            yield word
            word = []
        word.append(piece)
    if word:
        yield word


def _joined(word: list[_Piece], how: Aggregation) -> _Piece:
    if how == "first":
        scores = word[0].scores
    elif how == "max":
        scores = max(word, key=lambda piece: piece.score).scores
    else:
        scores = np.mean([piece.scores for piece in word], axis=0)
    return _Piece(word[0].start, word[-1].end, scores)


def _kind(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label
