"""Extractive summaries: a document's own key sentences, found with any Longformer encoder.

A sentence is worth as much as its mean state is near to the document's, or to a query's; what leads
the document counts for more, and what repeats a chosen sentence for less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from longformer_core.errors import LongformerError
from longformer_core.hub import resolve
from pipelines.errors import Refused
from pipelines.rows import InputColumn
from pipelines.tasks.base import Document, Output, Process
from pipelines.tasks.encoding import EncodingTask, owners
from pipelines.tasks.preparation import Frame, Window, single_frame, tokenizer_of
from pipelines.tasks.sentences import is_prose, sentence_spans
from pipelines.tasks.summarize import DECODING, SummarizeOptions, refuse_given, summary_inputs

if TYPE_CHECKING:
    from longformer_core.metrics import Scores

_NUM_SENTENCES = 5
# An encoder of sentences that was made long says less of what lies far apart.
_WINDOW_TOKENS = 1280
# The first sentence gains this much of a cosine, the one after `_LEAD_SENTENCES` a third of it.
_LEAD, _LEAD_SENTENCES = 0.2, 5
# How much of its likeness to the nearest chosen sentence counts against a sentence.
_REPETITION = 0.3
_QUERY = 1  # the part of the window that holds it
# What only an LED can do, and what reading the whole document leaves no room for.
_NOT_FOR_ENCODERS = (
    *DECODING, "early_stopping", "do_sample", "seed", "max_rounds", "keep_levels",
    "max_source_tokens",
)  # fmt: skip

SENTENCE = pa.struct(
    [
        pa.field("text", pa.large_string()),
        pa.field("start", pa.int64()),
        pa.field("end", pa.int64()),
        pa.field("score", pa.float64()),
    ]
)


@dataclass(frozen=True)
class ExtractiveSummarize(EncodingTask):
    """The sentences of a document that say most of it, or of what a query asks.

    Every window of the document is read. A sentence is read in the window where its middle has the
    most context. Only prose is quoted, unless a document has none.
    """

    options: SummarizeOptions  # type: ignore[assignment]

    name = "summarize"
    options_class = SummarizeOptions
    models: ClassVar = {"longformer": "LongformerModel"}
    takes_any_head = True
    needs_text = True
    default_stride = 0.1

    @classmethod
    def from_options(cls, options: Any, *, device: str) -> Self:
        """Check and resolve as every task, with windows of a length that suits an encoder."""
        chosen: dict[str, Any] = {"on_long": "windows"}
        if options.on_long == "error":
            raise Refused("--on-long error: an encoder reads every document whole, in windows")
        try:
            directory = resolve(options.model)
            if not options.window_tokens and not cls.check_directory(directory):
                chosen["window_tokens"] = min(_WINDOW_TOKENS, cls.num_positions(directory))
        except LongformerError as error:
            raise Refused(f"--model: {error}") from error
        return super().from_options(options.model_copy(update=chosen), device=device)

    @classmethod
    def _resolve(cls, options: Any, directory: Path) -> dict[str, Any]:
        refuse_given(options, _NOT_FOR_ENCODERS, "an encoder quotes sentences and writes none")
        if options.query is not None and options.query_column is not None:
            raise Refused("--query and --query-column: give one of them")
        if options.query is not None and not options.query.strip():
            raise Refused("--query: is blank; leave it out, or say what to look for")
        return super()._resolve(options, directory)

    @classmethod
    def inputs_of(cls, options: Any) -> tuple[InputColumn, ...]:
        return summary_inputs(options)

    @property
    def columns(self) -> pa.Schema:
        return pa.schema(
            [
                pa.field("summary", pa.large_string()),
                pa.field("sentences", pa.list_(SENTENCE)),
            ]
        )

    @property
    def num_sentences(self) -> int:
        """Sentences of a summary, at most."""
        return self.options.num_sentences or _NUM_SENTENCES

    def frames(self, block: pa.Table) -> list[list[Frame]]:
        return [[single_frame(tokenizer_of(self.model), is_first_global=False)]] * block.num_rows

    def extra_windows(self, block: pa.Table) -> list[list[Window]]:
        """Return the query of each row in a window of its own."""
        if self.options.query is not None:
            queries = [self.options.query] * block.num_rows
        elif self.options.query_column is not None:
            queries = block.column("__query").to_pylist()
        else:
            return super().extra_windows(block)
        tokenizer = tokenizer_of(self.model)
        frame = single_frame(tokenizer, is_first_global=False)
        room = self.window_tokens - frame.num_tokens
        return [
            [Window.of(each.ids, frame, 0, min(len(each.ids), room)).as_part(_QUERY)]
            for each in tokenizer.encode_with_offsets(queries)
        ]

    def _loading_options(self) -> dict[str, Any]:
        return {"add_pooling_layer": False}

    def process(self, document: Document) -> Process:
        assert document.text is not None
        assert document.offsets is not None
        text, windows = document.text, [w for w in document.windows if w.part != _QUERY]
        every = sentence_spans(text)
        prose = [span for span in every if is_prose(text[slice(*span)])] or every
        places = _places(prose, windows, document.offsets)
        asked = [
            self.request(
                window,
                want=("first",),
                spans=[slots for owner, slots in places if owner == number],
            )
            for number, window in enumerate(windows)
        ]
        queries = [w for w in document.windows if w.part == _QUERY]
        asked += [
            self.request(w, want=("mean",), mean_positions=range(1, len(w.input_ids) - 1))
            for w in queries
        ]
        results = yield asked
        if not prose:
            return Output({"summary": "", "sentences": []})
        # Results come window by window, as `asked` took the sentences.
        order = np.argsort([owner for owner, _ in places], kind="stable")
        means = [r.span_means.numpy() for r in results[: len(windows)] if r.span_means is not None]
        vectors = np.empty((len(places), means[0].shape[1]), means[0].dtype)
        vectors[order] = np.concatenate(means)
        about = results[-1].mean.numpy() if queries else None
        sentences = [
            {
                "text": text[slice(*prose[i])],
                "start": prose[i][0],
                "end": prose[i][1],
                "score": score,
            }
            for i, score in choose(vectors, self.num_sentences, about)
        ]
        # A sentence that runs over lines is one line of a summary.
        lines = (" ".join(str(each["text"]).split()) for each in sentences)
        return Output({"summary": " ".join(lines), "sentences": sentences})

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> "Scores":
        """ROUGE of the summaries; a reference is a text, or a list of them."""
        from longformer_core.metrics import score_summaries

        return score_summaries(predictions, references)

    def _fingerprint_options(self) -> dict[str, Any]:
        names = ("query", "query_column")
        return {
            "window_tokens": self.window_tokens,
            "stride_tokens": self.stride_tokens,
            "num_sentences": self.num_sentences,
            **{name: getattr(self.options, name) for name in names},
        }

    def output_row_bytes(self) -> int:
        """Return two copies of each sentence, and the counts."""
        return 500 * self.num_sentences + 200

    def describe(self) -> dict[str, str]:
        by = "centrality, the first ones preferred"
        if self.options.query_column or self.options.query:
            by = f"likeness to {self.options.query_column or repr(self.options.query)}"
        said = f"extractive: {self.num_sentences} sentences of the document, by {by}"
        return super().describe() | {"summary": said}


def choose(
    vectors: np.ndarray, count: int, about: np.ndarray | None = None
) -> list[tuple[int, float]]:
    """Return the places and scores of the best sentences, in the order of the document.

    A sentence is as good as it is near to `about`, or else to the mean of all, where the first ones
    gain; of sentences that say the same only one is taken (maximal marginal relevance).
    Shapes: vectors [K, d], about [d].
    """
    unit = _unit(vectors)
    if about is None:
        worth = unit @ _unit(vectors.mean(axis=0)[None])[0]
        worth = worth + _LEAD * np.exp(-np.arange(len(unit)) / _LEAD_SENTENCES)
    else:
        worth = unit @ _unit(about[None])[0]
    chosen: list[int] = []
    likeness, left = np.zeros(len(worth)), worth.copy()
    for _ in range(min(count, len(worth))):
        best = int((left - _REPETITION * likeness).argmax())
        chosen.append(best)
        left[best] = -np.inf
        likeness = np.maximum(likeness, unit @ unit[best])
    return [(place, float(worth[place])) for place in sorted(chosen)]


def _places(
    spans: Sequence[tuple[int, int]], windows: Sequence[Window], offsets: np.ndarray
) -> list[tuple[int, tuple[int, int]]]:
    """Return for each sentence the window that it is read in, and its slots there."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    owner = owners(windows, len(offsets))
    found = []
    for begin, end in spans:
        # Offsets grow from token to token; a sentence without a token of its own takes the next.
        first = min(int(np.searchsorted(ends, begin, "right")), len(offsets) - 1)
        last = max(int(np.searchsorted(starts, end, "left")), first + 1)
        number = int(owner[(first + last - 1) // 2])
        window = windows[number]
        low = max(first, window.start) - window.start + window.first
        high = min(last, window.start + window.size) - window.start + window.first
        found.append((number, (low, high)))
    return found


def _unit(vectors: np.ndarray) -> np.ndarray:
    """[K, d] -> [K, d], each of length 1."""
    lengths: np.ndarray = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12))
